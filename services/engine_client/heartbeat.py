"""Tells an engine that hangs from a busy one.

A thread in the engine's process sends a beat at intervals, with how long the present step has been computing.
On the API's side a `Watch` judges by what comes: silence means that the process is frozen, a step past its
limit that the step hangs. So a step may take minutes (a first compilation, a huge prompt) while beats come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from services.engine.messages import Beat

INTERVAL_S = 0.5


def start_beating(tell: Callable[[Beat], None], busy_s: Callable[[], float]) -> None:
    """Send a beat each `INTERVAL_S` from a daemon thread; `busy_s` is how long the present step has run."""

    def beat() -> None:
        while True:
            tell(Beat(busy_s()))
            time.sleep(INTERVAL_S)

    threading.Thread(target=beat, name="lab-heartbeat", daemon=True).start()


class Watch:
    """Judges an engine by its messages. A limit of 0 is none; `now_s` is on any monotonic clock."""

    def __init__(self, silence_limit_s: float, step_limit_s: float, now_s: float) -> None:
        self._silence_limit_s = silence_limit_s
        self._step_limit_s = step_limit_s
        self._heard_s = now_s
        self._checked_s = now_s
        self._busy_s = 0.0

    def heard(self, now_s: float, busy_s: float = 0.0) -> None:
        """Note that a message came; `busy_s` stays 0 for all but beats, since a report ends its step."""
        self._heard_s = now_s
        self._busy_s = busy_s

    def check(self, now_s: float) -> str | None:
        """What is wrong, or None; to be called each `INTERVAL_S`."""
        is_late = now_s - self._checked_s > 3 * INTERVAL_S
        self._checked_s = now_s
        if is_late:
            # The caller itself was held up, and beats that came meanwhile are not read yet.
            self._heard_s = now_s
            return None
        if self._step_limit_s and self._busy_s > self._step_limit_s:
            return f"a step, or its messages, took longer than STEP_TIMEOUT_S = {self._step_limit_s:g} s"
        silent_s = now_s - self._heard_s
        if self._silence_limit_s and silent_s > self._silence_limit_s:
            return f"its process gave no sign of life for {silent_s:.1f} s"
        return None
