"""The log of engine steps behind `/steps`.

Step records enter; JSON leaves, for the steps asked for. It keeps the latest ones and numbers them itself,
on and on, since a restarted engine counts from zero again.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from services.messages import StepRecord

MAX_STEPS = 100_000


class StepLog:
    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._lines: deque[str] = deque(maxlen=max_steps)  # encoded at once: a poll then only joins
        self._next = 0

    def add(self, record: StepRecord) -> None:
        r = record
        self._lines.append(
            f'{{"step":{self._next},"start_s":{r.start_s!r},"duration_s":{r.duration_s!r},"num_rows":{r.num_rows},'
            f'"num_prompt_tokens":{r.num_prompt_tokens},"num_decode_tokens":{r.num_decode_tokens},'
            f'"num_dead_rows":{r.num_dead_rows},"queue_depth":{r.queue_depth}}}'
        )
        self._next += 1

    def page(self, after: int) -> bytes:
        """The steps from number `after` on; `num_dropped` says how many of those are no longer kept."""
        first_kept = self._next - len(self._lines)
        num_dropped = max(0, first_kept - after)
        lines = ",".join(islice(self._lines, max(0, after - first_kept), None))
        return f'{{"steps":[{lines}],"next":{self._next},"num_dropped":{num_dropped}}}'.encode()
