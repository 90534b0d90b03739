"""A clock that only waiting moves, and an inbox that waits on it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from services.engine.message_loop import Message
from services.engine.messages import Stop


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


class ScriptedInbox:
    """Messages that come at set times; waiting for them is what moves the clock, and `Stop` ends it."""

    def __init__(self, clock: Clock, script: Seq[tuple[float, Message]]) -> None:
        self._clock = clock
        self._script = [(clock.now_s + at_s, message) for at_s, message in script]
        self.waits: list[float | None] = []

    def get(self, timeout_s: float | None) -> Message | None:
        if timeout_s != 0:
            self.waits.append(None if timeout_s is None else round(timeout_s, 6))
        if self._script:
            at_s, message = self._script[0]
            if timeout_s is None or at_s <= self._clock.now_s + timeout_s:
                self._clock.now_s = max(self._clock.now_s, at_s)
                del self._script[0]
                return message
        if timeout_s is None:
            return Stop()
        self._clock.now_s += timeout_s
        return None
