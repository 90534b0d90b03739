"""Tells a hung engine from a busy one.

In the engine's process a thread of its own says at intervals that the process lives, and for how long the
present step has been computing. On the API's side a `Watch` takes these beats and the time, and says what
is wrong, if anything: silence means that the process is frozen, a step past its limit that the step is
stuck. So a step may take minutes (a first compilation, a huge prompt) while the thread beside it still beats.
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
    """Judges an engine by what it lets hear. A limit of 0 is none; `now_s` is any monotonic clock."""

    def __init__(self, silence_limit_s: float, step_limit_s: float, now_s: float) -> None:
        self._silence_limit_s = silence_limit_s
        self._step_limit_s = step_limit_s
        self._heard_s = now_s
        self._checked_s = now_s
        self._busy_s = 0.0

    def heard(self, now_s: float, busy_s: float = 0.0) -> None:
        """Something came; anything but a beat means that a step has just ended."""
        self._heard_s = now_s
        self._busy_s = busy_s

    def check(self, now_s: float) -> str | None:
        """What is wrong, to be asked each `INTERVAL_S`.

        A check that comes late says nothing: whoever was held up here could not hear the beats either.
        """
        is_late = now_s - self._checked_s > 3 * INTERVAL_S
        self._checked_s = now_s
        if is_late:
            self._heard_s = now_s
            return None
        if self._step_limit_s and self._busy_s > self._step_limit_s:
            return f"one step took longer than STEP_TIMEOUT_S = {self._step_limit_s:g} s"
        silent_s = now_s - self._heard_s
        if self._silence_limit_s and silent_s > self._silence_limit_s:
            return f"its process gave no sign of life for {silent_s:.1f} s"
        return None
