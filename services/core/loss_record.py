"""Which requests were in flight when the engine was lost, so that none of them kills engine after engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

REFUSED_FOR_S = 300.0
"""Also the longest time between two losses that count as in a row."""


class LossRecord:
    """A request is told by its fingerprint: a client that tries again sends the same prompts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lost: Collection[int] = ()
        self._lost_s = 0.0
        self._refused_until_s: dict[int, float] = {}

    def lost(self, fingerprints: Collection[int]) -> None:
        """The engine is gone, and these requests were in flight."""
        now_s = self._clock()
        self._refused_until_s = {f: end_s for f, end_s in self._refused_until_s.items() if end_s > now_s}
        if now_s - self._lost_s <= REFUSED_FOR_S:
            again = set(fingerprints).intersection(self._lost)
            self._refused_until_s |= dict.fromkeys(again, now_s + REFUSED_FOR_S)
        self._lost, self._lost_s = fingerprints, now_s

    def refused_for_s(self, fingerprint: int) -> float:
        """For how long a request is refused that was in flight in two losses in a row; 0 for all others."""
        if not self._refused_until_s:
            return 0.0
        return max(0.0, self._refused_until_s.get(fingerprint, 0.0) - self._clock())
