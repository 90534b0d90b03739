"""Memory that the service no longer uses goes back to the system.

The C library keeps what is freed below something that is still used: after a burst of large bodies, for ever.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys

import psutil

EVERY_S = 20.0
"""Takes a few milliseconds each time."""
_GROWN = 1.01


async def keep_trimmed() -> None:
    """Give back now and then, for as long as the task lives, while the process is larger than it was."""
    process = psutil.Process()
    least = process.memory_info().rss
    while True:
        await asyncio.sleep(EVERY_S)
        size = process.memory_info().rss
        if size > _GROWN * least:
            await asyncio.to_thread(give_back)
            size = process.memory_info().rss
        least = min(least, size)


def give_back() -> None:
    """Collect garbage and, with glibc, hand the free pages of the heap to the system."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
