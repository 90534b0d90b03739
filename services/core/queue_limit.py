"""How much may wait, and when to come back where it is too much.

The limit is asked before a prompt is tokenized, so that a full queue costs nothing, and once more when the
prompt's length is known. The service rate is measured on requests that leave the queue (get their first
token) while others wait behind them. MAX_QUEUE counts requests and prompts apart, so that a few requests of
hundreds of prompts do not fill the queue with hours of work.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from services import errors

MAX_RETRY_AFTER_S = 60
_NUM_STARTS = 64


class QueueLimit:
    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._starts_s: deque[float] = deque(maxlen=_NUM_STARTS)
        self._num_entering = 0
        self._num_prompts_entering = 0

    @contextmanager
    def enter(
        self, num_waiting: int, waiting_prompts: int, waiting_tokens: int, num_prompts: int, now_s: float
    ) -> Iterator[None]:
        """Count a request that is still to be tokenized as waiting, until the caller itself does.

        Where nothing waits, a request of any number of prompts is welcome.

        Raises:
            ApiError: 429, too many requests wait, or too many prompts beside those of this request.
        """
        num_waiting += self._num_entering
        waiting_prompts += self._num_prompts_entering
        if num_waiting >= self._max_requests:
            raise errors.queue_full(self._max_requests, self.retry_after_s(num_waiting, now_s))
        if waiting_prompts and waiting_prompts + num_prompts > self._max_requests:
            raise errors.queue_prompts_full(self._max_requests, self.retry_after_s(num_waiting, now_s))
        self.check_tokens(num_waiting, waiting_tokens, 1, now_s)
        self._num_entering += 1
        self._num_prompts_entering += num_prompts
        try:
            yield
        finally:
            self._num_entering -= 1
            self._num_prompts_entering -= num_prompts

    def check_tokens(self, num_waiting: int, waiting_tokens: int, num_tokens: int, now_s: float) -> None:
        """Where nothing waits, a request of any length that fits the model is welcome.

        Raises:
            ApiError: 429, its `num_tokens` are too many beside those that wait already.
        """
        if waiting_tokens and waiting_tokens + num_tokens > self._max_tokens:
            raise errors.queue_tokens_full(self._max_tokens, self.retry_after_s(num_waiting, now_s))

    def started(self, num_requests: int, num_waiting: int, now_s: float) -> None:
        """`num_requests`, perhaps 0, just got their first token; `num_waiting` still wait."""
        if num_waiting:
            self._starts_s.extend([now_s] * num_requests)
        else:
            self._starts_s.clear()

    def retry_after_s(self, num_waiting: int, now_s: float) -> int:
        """When all that waits now will have started, at the measured rate; 1 where none was measured yet."""
        if len(self._starts_s) < 2:
            return 1
        rate_per_s = (len(self._starts_s) - 1) / max(1e-6, now_s - self._starts_s[0])
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(num_waiting / rate_per_s)))
