"""Calls come in order, never early, and stop when they should."""

from __future__ import annotations

import asyncio
from time import perf_counter

import pytest

from harness.replay.pacer import pace


def paced(offsets_s: list[float], stop_after: int | None = None) -> tuple[float, list[float]]:
    fired: list[float] = []

    async def main() -> float:
        start_s = perf_counter()
        await pace(
            offsets_s,
            start_s,
            lambda: fired.append(perf_counter()),
            lambda: stop_after is not None and len(fired) >= stop_after,
        )
        return start_s

    return asyncio.run(main()), fired


def test_no_call_is_early_and_none_is_left_out() -> None:
    offsets_s = [0.0, 0.01, 0.01, 0.03, 0.05]
    start_s, fired = paced(offsets_s)
    assert len(fired) == len(offsets_s)
    assert all(at >= start_s + offset for at, offset in zip(fired, offsets_s, strict=True))
    assert fired == sorted(fired)


def test_it_stops_between_calls() -> None:
    # The rest would come after an hour.
    _, fired = paced([0.0, 0.01, 3600.0], stop_after=2)
    assert len(fired) == 2


def test_what_a_call_raises_is_raised() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        await pace([0.0, 3600.0], perf_counter(), fail, lambda: False)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
