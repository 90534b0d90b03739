"""Slots as lanes: who held which one until when, and how the slots' time was spent."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from harness.page.timeline import batch_timeline
from harness.results.record import Row
from tests.harness.made_rows import made_frame, made_row


def asked(index: int, joined_s: float, first_s: float, finished_s: float) -> Row:
    row = made_row(index, scheduled_s=joined_s)
    times = {
        "queue_s": 0.0,
        "batch_wait_s": 0.0,
        "prefill_s": first_s - joined_s,
        "decode_s": finished_s - first_s,
    }
    return row | times | {"received_s": joined_s}


def steps(*lines: tuple[float, float, int, int]) -> pd.DataFrame:
    """Start, length, live and dead rows."""
    names = ("start_s", "duration_s", "num_rows", "num_dead_rows")
    entries: list[dict[str, Any]] = [dict(zip(names, line, strict=True)) for line in lines]
    return pd.DataFrame(entries)


def test_dead_rows_hold_their_slot_until_the_batch_ends() -> None:
    # Two rows; the second finishes at 2 and is dead until 4. The next batch takes both lanes again.
    log = steps((100, 1, 2, 0), (101, 1, 2, 0), (102, 1, 1, 1), (103, 1, 1, 1), (105, 1, 2, 0))
    rows = made_frame(
        [asked(0, 100, 101, 104), asked(1, 100, 101, 102), asked(2, 105, 106, 106), asked(3, 105, 106, 106)]
    )
    line = batch_timeline(rows, log, num_slots=2)
    assert line is not None
    assert [(bar.lane, bar.joined_s, bar.finished_s, bar.left_s) for bar in line.bars] == [
        (0, 0, 4, 4), (1, 0, 2, 4), (0, 5, 6, 6), (1, 5, 6, 6),
    ]  # fmt: skip
    assert (line.num_lanes, line.span_s) == (2, 6)
    assert (line.live_share, line.dead_share) == pytest.approx((8 / 12, 2 / 12))
    assert line.idle_share == pytest.approx(2 / 12)


def test_a_freed_slot_is_taken_again() -> None:
    log = steps((0, 1, 1, 0), (1, 1, 1, 0))
    line = batch_timeline(made_frame([asked(0, 0, 1, 1), asked(1, 1, 2, 2)]), log, num_slots=4)
    assert line is not None
    assert [bar.lane for bar in line.bars] == [0, 0]
    assert line.num_lanes == 4
    assert line.idle_share == pytest.approx(0.75)


def test_without_stamps_or_steps_there_is_no_timeline() -> None:
    assert batch_timeline(made_frame([made_row()]), steps((0, 1, 1, 0)), 1) is None
    assert batch_timeline(made_frame([asked(0, 0, 1, 1)]), pd.DataFrame(), 1) is None
