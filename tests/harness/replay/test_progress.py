"""What is shown while a run goes on."""

from __future__ import annotations

import pytest

from harness.client.answer import Answer
from harness.plan.corpus import Prompt
from harness.plan.schedule import Arrivals, Load, make_schedule
from harness.replay.progress import PlainReporter

PROMPTS = [Prompt(id="p", prompt="x", max_tokens=3)]


@pytest.mark.parametrize(
    ("load", "in_flight"), [(Load(Arrivals.CLOSED, concurrency=3), 2), (Load(Arrivals.CONSTANT, rate=1e6), 2)]
)
def test_plain_lines_tell_all(load: Load, in_flight: int, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = make_schedule(PROMPTS, 4, load, seed=1)
    reporter = PlainReporter()
    reporter.begin("arm", schedule)
    for index, planned in enumerate(schedule.requests):
        answer = Answer(planned, scheduled_s=10.0, chunk_s=[10.5], num_output_tokens=3)
        answer.error = "http 500" if index == 1 else None
        if index == 2:
            assert reporter._tally is not None
            assert reporter._tally.text().startswith(f"{in_flight} in flight")
            assert "s left" in reporter._tally.text()
        reporter.advance(answer)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("arm: 4/4 answered, 0 in flight, ")
    assert "TTFT p50 500 ms, 1 failed" in last
