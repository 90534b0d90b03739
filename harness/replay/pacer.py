"""Calls back at planned instants, closer to them than an event loop's timers come.

A thread of its own sleeps: a virtual machine wakes it within 0.3 ms, where the timers of the loop round to a
millisecond. No call is early, and a late one shifts none of the others.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from time import perf_counter

LONGEST_SLEEP_S = 0.2


async def pace(
    offsets_s: Sequence[float], start_s: float, fire: Callable[[], None], is_stopped: Callable[[], bool]
) -> None:
    """Call `fire` at `start_s` + each offset; return after the last call, or soon after `is_stopped`.

    Raises:
        Exception: whatever `fire` raised; the calls that were still to come are dropped.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    leave = threading.Event()

    def fire_one() -> None:
        if done.done():
            return
        try:
            fire()
        except BaseException as error:
            done.set_exception(error)

    def finish() -> None:
        if not done.done():
            done.set_result(None)

    def sleep_and_fire() -> None:
        for offset_s in offsets_s:
            while (remaining_s := start_s + offset_s - perf_counter()) > 0:
                if leave.wait(min(remaining_s, LONGEST_SLEEP_S)) or is_stopped():
                    break
            if leave.is_set() or is_stopped():
                break
            loop.call_soon_threadsafe(fire_one)
        if not leave.is_set():
            loop.call_soon_threadsafe(finish)

    thread = threading.Thread(target=sleep_and_fire, name="pacer", daemon=True)
    thread.start()
    try:
        await done
    finally:
        leave.set()
        await asyncio.to_thread(thread.join)
