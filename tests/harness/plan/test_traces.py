"""Public traces: times from the first row, lengths exact, nothing bent."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.base import ConfigError
from harness.plan.planner import plan
from harness.plan.traces import load_trace, synthetic_corpus, trace_corpus
from harness.results.manifest import ScheduleFacts
from harness.settings import HarnessSettings

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.0781490,110,27
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [1, 2]}
{"timestamp": 30535, "input_length": 647, "output_length": 26, "hash_ids": [1]}
"""
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,1,2,ChatGPT,472,18,490,Conversation log
45,2,3,ChatGPT,1087,0,1087,Conversation log
118,3,3,GPT-4,417,276,693,Conversation log
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "rows", "num_left_out"),
    [
        (AZURE, [(0.0, 4808, 10), (0.052, 3180, 8), (0.098189, 110, 27)], 0),
        (MOONCAKE, [(0.0, 6955, 52), (3.053, 647, 26)], 0),
        (BURSTGPT, [(0.0, 472, 18), (113.0, 417, 276)], 1),
    ],
)
def test_formats(tmp_path: Path, text: str, rows: list[tuple[float, int, int]], num_left_out: int) -> None:
    trace = load_trace(write(tmp_path, text), num_rows=10)
    found = [(row.offset_s, row.num_prompt_tokens, row.num_output_tokens) for row in trace.rows]
    assert found == [(pytest.approx(offset, abs=1e-6), *lengths) for offset, *lengths in rows]
    assert trace.num_left_out == num_left_out


def test_scale_and_cap(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, AZURE), num_rows=2, time_scale=10.0, max_tokens=4000)
    assert [row.offset_s for row in trace.rows] == pytest.approx([0.0, 0.46189])
    assert trace.num_left_out == 1


def test_prompts_have_exactly_the_lengths_and_no_common_beginning(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, AZURE), num_rows=3)
    prompts = trace_corpus(trace, tmp_path / "trace", seed=1).prompts
    assert [(len(p.prompt), p.max_tokens) for p in prompts] == [(4808, 10), (3180, 8), (110, 27)]
    assert len({p.prompt[:8] for p in prompts}) == 3
    assert trace_corpus(trace, tmp_path / "trace", seed=1).prompts == prompts
    many = synthetic_corpus("12x3", 50, seed=2).prompts
    assert {(len(p.prompt), p.max_tokens) for p in many} == {(12, 3)}
    assert len({p.prompt for p in many}) == 50


def test_a_trace_is_the_schedule(tmp_path: Path) -> None:
    settings = HarnessSettings(trace=write(tmp_path, AZURE), time_scale=2.0)
    corpus, schedule = plan(settings, allow_changed_corpus=False)
    assert [r.offset_s for r in schedule.requests] == pytest.approx([0.0, 0.104, 0.196378])
    assert schedule.load.rate == pytest.approx(2 / 0.196378)
    assert corpus.is_as_recorded
    described = ScheduleFacts(
        digest="d", num_requests=3, arrivals="trace", concurrency=None,
        rate=schedule.load.rate, shape=schedule.load.shape,
    )  # fmt: skip
    assert described.load.shape == schedule.load.shape


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "", '{"timestamp": 1}', AZURE.splitlines()[0]])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="trace"):
        load_trace(write(tmp_path, text), num_rows=5)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out RATE"):
        plan(HarnessSettings(trace=write(tmp_path, AZURE), rate=2.0), allow_changed_corpus=False)
    with pytest.raises(ConfigError, match="CV=2 needs ARRIVALS=gamma"):
        plan(HarnessSettings(trace=write(tmp_path, AZURE), cv=2.0), allow_changed_corpus=False)
    with pytest.raises(ConfigError, match="TIME_SCALE=5 needs a TRACE"):
        plan(HarnessSettings(time_scale=5.0), allow_changed_corpus=False)
    with pytest.raises(ConfigError, match="TRACE_MAX_TOKENS=99 needs a TRACE"):
        plan(HarnessSettings(trace_max_tokens=99), allow_changed_corpus=False)
    with pytest.raises(ConfigError, match="PROMPTxOUTPUT"):
        synthetic_corpus("512", 3, 0)
