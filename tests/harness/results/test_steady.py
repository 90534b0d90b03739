"""The steady window on replays small enough to check by hand: no burst in it, and no end."""

from __future__ import annotations

import pytest

from harness.plan.schedule import Arrivals, Load
from harness.results.record import Row
from harness.results.steady import FIGURES, steady_figures, steady_window
from tests.harness.made_rows import made_frame, made_row

OPEN = Load(Arrivals.CONSTANT, rate=1.0)
TWO_USERS = Load(Arrivals.CLOSED, concurrency=2)


def answer(index: int, scheduled_s: float, first_s: float, last_s: float) -> Row:
    """Three tokens: the first, one half-way, the last."""
    stamps = (first_s, (first_s + last_s) / 2, last_s)
    return made_row(
        index, scheduled_s=scheduled_s, sent_s=scheduled_s, chunk_s=stamps, chunk_tokens=(1, 1, 1)
    )


# Two users begin at 0, the second is served at 3 only. Then answers of 2 s, and the second user's last alone.
CLOSED = [
    answer(0, 0.0, 1.0, 2.0),
    answer(1, 0.0, 3.0, 4.0),
    answer(2, 2.0, 2.5, 4.5),
    answer(3, 4.0, 4.5, 6.5),
    answer(4, 4.5, 5.0, 7.0),
    answer(5, 6.5, 7.0, 10.0),
]


def test_closed_from_the_last_first_token_of_the_burst_to_the_first_user_without_work() -> None:
    found = steady_window(made_frame(CLOSED), TWO_USERS)
    assert found is not None
    # Answer 4 ends at 7.0, when the last request is already taken: its user has nothing more to ask.
    assert (found.start_s, found.end_s) == (3.0, 7.0)
    assert found.share == pytest.approx(4.0 / 10.0)
    assert list(found.rows["schedule_index"]) == [3, 4, 5]
    # Stamps after 3.0 and up to 7.0: two of 1, two of 2, three each of 3 and of 4, one of 5.
    assert found.output_tokens_per_s == pytest.approx((2 + 2 + 3 + 3 + 1) / 4.0)


def test_a_thinking_user_is_not_idle() -> None:
    """The last request was taken at 6.5, whenever its user asks; the next end closes the window."""
    later = [*CLOSED[:5], answer(5, 9.0, 9.5, 10.0)]
    found = steady_window(made_frame(later), TWO_USERS)
    assert found is not None
    assert found.end_s == 7.0


def test_open_without_the_first_and_the_last_mean_service_time() -> None:
    rows = [
        made_row(i, scheduled_s=float(i), offset_s=float(i), sent_s=float(i), chunk_s=(i + 0.5, i + 2.0))
        for i in range(11)
    ]
    found = steady_window(made_frame(rows), OPEN)
    assert found is not None
    assert (found.start_s, found.end_s) == (2.0, 8.0)
    assert found.share == pytest.approx(0.6)
    assert list(found.rows["schedule_index"]) == list(range(2, 8))
    assert found.output_tokens_per_s == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("rows", "load"),
    [
        (CLOSED[:2], TWO_USERS),
        (CLOSED, Load(Arrivals.CLOSED, concurrency=6)),
        ([made_row(0, offset_s=0.0), made_row(1, scheduled_s=1.0, offset_s=1.0)], OPEN),
        ([made_row(i, error="http 500", chunk_s=()) for i in range(4)], TWO_USERS),
    ],
)  # fmt: skip
def test_no_window_where_load_was_never_as_asked(rows: list[Row], load: Load) -> None:
    assert steady_window(made_frame(rows), load) is None
    assert steady_figures(made_frame(rows), load) is None


def test_a_window_of_a_few_steps_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.results.steady.SHORTEST_SHARE", 0.45)
    assert steady_window(made_frame(CLOSED), TWO_USERS) is not None
    assert steady_figures(made_frame(CLOSED), TWO_USERS) is None


def test_figures_are_medians_over_replays_and_say_where_samples_are_few() -> None:
    again = [row | {"repeat": 1} for row in CLOSED]
    found = steady_figures(made_frame([*CLOSED, *again]), TWO_USERS)
    assert found is not None
    assert (found.num_requests, found.share) == (3, pytest.approx(0.4))
    assert dict(zip((f.key for f in FIGURES), found.latencies, strict=True)) == {
        "ttft_p50_ms": pytest.approx(500.0), "ttft_p95_ms": None,
        "tpot_p50_ms": pytest.approx(1000.0), "tpot_p95_ms": None,
    }  # fmt: skip
