"""Work on long texts, a few at a time: each is done in a thread beside the event loop and takes a core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services import errors

AT_ONCE_BYTES = 1 << 20
WAITING_BYTES = 32 << 20


class ByteLimit:
    """`hold` lets in `at_once` bytes together, in the order of the calls; a longer text goes in alone."""

    def __init__(self, at_once: int = AT_ONCE_BYTES, waiting: int = WAITING_BYTES) -> None:
        self._at_once = at_once
        self._free = at_once
        self._waiting_room = waiting
        self._turn = asyncio.Lock()  # lets its waiters in in their order
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait for a turn.

        Raises:
            ApiError: 429, too many bytes wait already.
        """
        if num_bytes > self._waiting_room:
            raise errors.too_many_bytes()
        self._waiting_room -= num_bytes
        taken = min(num_bytes, self._at_once)
        try:
            async with self._turn:
                while self._free < taken:
                    self._freed.clear()
                    await self._freed.wait()
                self._free -= taken
        finally:
            self._waiting_room += num_bytes
        try:
            yield
        finally:
            self._free += taken
            self._freed.set()
