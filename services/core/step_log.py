"""The log of engine steps behind `/steps`.

Step records enter; JSON leaves, for the steps asked for. It keeps the latest ones, in 80 bytes each, and
numbers them itself, on and on, since a restarted engine counts from zero again.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from struct import Struct

from services.engine.messages import StepRecord

MAX_STEPS = 100_000
PAGE_STEPS = 5_000
"""Steps of one page: some 10 ms of the API's time."""

_RECORD = Struct("<ddIIIII")


class StepLog:
    def __init__(self, max_steps: int = MAX_STEPS, page_steps: int = PAGE_STEPS) -> None:
        self._records: deque[bytes] = deque(maxlen=max_steps)
        self._page_steps = page_steps
        self._next = 0

    def add(self, record: StepRecord) -> None:
        r = record
        counts = r.num_rows, r.num_prompt_tokens, r.num_decode_tokens, r.num_dead_rows, r.queue_depth
        self._records.append(_RECORD.pack(r.start_s, r.duration_s, *counts))
        self._next += 1

    def page(self, after: int) -> bytes:
        """Steps from number `after` on, the first thousands of them: `next` asks for what follows.

        `num_dropped` says how many from `after` on are no longer kept.
        """
        first_kept = self._next - len(self._records)
        begin = min(max(after, first_kept), self._next)
        records = islice(self._records, begin - first_kept, begin - first_kept + self._page_steps)
        lines = [_line(number, record) for number, record in enumerate(records, start=begin)]
        following = begin + len(lines)
        num_dropped = max(0, first_kept - after)
        return f'{{"steps":[{",".join(lines)}],"next":{following},"num_dropped":{num_dropped}}}'.encode()


def _line(number: int, record: bytes) -> str:
    start_s, duration_s, rows, prompt_tokens, decode_tokens, dead_rows, queue_depth = _RECORD.unpack(record)
    return (
        f'{{"step":{number},"start_s":{start_s!r},"duration_s":{duration_s!r},"num_rows":{rows},'
        f'"num_prompt_tokens":{prompt_tokens},"num_decode_tokens":{decode_tokens},'
        f'"num_dead_rows":{dead_rows},"queue_depth":{queue_depth}}}'
    )
