"""Public traces: times from the first row, lengths exact, nothing bent."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.base import ConfigError
from harness.plan.planner import plan
from harness.plan.synthetic import synthetic_corpus
from harness.plan.traces import load_trace, trace_corpus
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


def test_equal_hash_ids_are_equal_tokens(tmp_path: Path) -> None:
    """Whole blocks of 512, the last one cut at the end of the prompt; what no id covers is the row's own."""
    rows = [(1100, [7, 8, 9]), (1536, [7, 8, 5]), (600, [7]), (600, [7]), (512, [8])]
    lines = [
        f'{{"timestamp": {at}, "input_length": {length}, "output_length": 3, "hash_ids": {ids}}}'
        for at, (length, ids) in enumerate(rows)
    ]
    trace = load_trace(write(tmp_path, "\n".join(lines)), num_rows=9)
    first, second, third, fourth, other = (p.prompt for p in trace_corpus(trace, tmp_path, seed=1).prompts)
    assert [len(p) for p in (first, second, third, fourth, other)] == [length for length, _ in rows]
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:1100]
    assert third[:512] == fourth[:512] == first[:512]
    assert third[512:] != fourth[512:]
    assert other == first[512:1024]
    again = load_trace(write(tmp_path, "\n".join(lines).replace("[8]", "[6]")), num_rows=9)
    assert again.content_digest != trace.content_digest
    with pytest.raises(ConfigError, match="hash_ids is 'x'"):
        load_trace(write(tmp_path, lines[0].replace("[7, 8, 9]", '"x"')), num_rows=9)


def test_synthetic_prompts_may_begin_alike() -> None:
    prompts = [p.prompt for p in synthetic_corpus("48+16x3", 20, seed=2).prompts]
    assert {len(ids) for ids in prompts} == {64}
    assert len({ids[:48] for ids in prompts}) == 1
    assert len({ids[48:] for ids in prompts}) == 20
    for wrong in ("48+x3", "+16x3", "48+0x3", "16x", "1+2+3x4"):
        with pytest.raises(ConfigError, match="COMMON"):
            synthetic_corpus(wrong, 1, seed=2)


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


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n",
        "",
        '{"timestamp": 1}',
        AZURE.splitlines()[0],
        AZURE.replace("\n", "\r"),
        "x" * 200_000,
    ],
)
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


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("stamps", "offset_s"),
    [
        (("2025-06-01 10:00:00.25Z", "2025-06-01 10:00:01.75Z"), 1.5),
        (("2025-06-01T10:00:00.25-05:00", "2025-06-01 10:00:01.75-0500"), 1.5),
        (("2025-10-26 02:59:59.5+02:00", "2025-10-26 02:00:00.5+01:00"), 1.0),
        (("2025-06-01 10:00:00.009+00:00", "2025-06-01 10:00:01+00:00"), 0.991),
        (("2025-06-01 10:00:00.1234567", "2025-06-01 10:00:00.1234569"), 2e-7),
        (("2025-06-01 10:00:05", "2025-06-01 10:00:03.5"), 1.5),
        (("2025-06-01 10:00:00.25+05", "2025-06-01 10:00:01.75 +05:00"), 1.5),
        (("2025-06-01 10:00:00.25 UTC", "2025-06-01 10:00:01.75utc"), 1.5),
        ((f"2025-06-01 10:00:00.25{'0' * 30}", "2025-06-01 10:00:01.75"), 1.5),
    ],
    ids=[
        *("zulu", "negative offset", "offset that changes", "whole second", "seven digits", "unsorted"),
        *("hours alone", "in words", "many digits"),
    ],
)
def test_time_stamps_are_read_whole(tmp_path: Path, stamps: tuple[str, str], offset_s: float) -> None:
    text = HEADER + "".join(f"{stamp},10,4\n" for stamp in stamps)
    trace = load_trace(write(tmp_path, text), num_rows=2)
    assert [row.offset_s for row in trace.rows] == [0.0, offset_s]


def test_the_earliest_rows_are_taken_wherever_they_stand(tmp_path: Path) -> None:
    seconds = [9, 4, 5, 0]
    text = HEADER + "".join(f"2025-06-01 10:00:0{second},{10 + second},4\n" for second in seconds)
    trace = load_trace(write(tmp_path, text), num_rows=2)
    assert [(row.offset_s, row.num_prompt_tokens) for row in trace.rows] == [(0.0, 10), (4.0, 14)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER + "2025-06-01 10:00:00,10,4\n2025-06-01 10:00:01,-4,4\n", "line 3.*ContextTokens is -4"),
        (HEADER + "2025-06-01 10:00:00,10,99999999999\n", "line 2.*GeneratedTokens is 99999999999"),
        (HEADER + "2025-06-01 10:00:00,10.5,4\n", "line 2.*10.5.*whole number"),
        (HEADER + "2025-06-01 10:00:00,nan,4\n", "line 2.*nan"),
        (HEADER + "2025-06-01 10:00:00,10\n", "line 2.*GeneratedTokens is missing"),
        (HEADER + "2025-06-01 10:00:00,1,024,4\n", "line 2: has more cells"),
        (HEADER + "yesterday,10,4\n", "line 2.*'yesterday' is no time stamp"),
        (HEADER + "2025-13-01 10:00:00,10,4\n", "line 2.*month"),
        (HEADER + "1970-01-01 10:00:00,10,4\n2025-06-01 10:00:00,10,4\n", "line 3.*ten years"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "line 1.*timestamp is nan"),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}', "line 1.*timestamp is inf"),
        ('{"timestamp": -5, "input_length": 1, "output_length": 1}', "line 1.*timestamp is -5"),
        ('{"timestamp": 5, "input_length": true, "output_length": 1}', "line 1.*input_length is True"),
        ('{"timestamp": 5, "input_length": 1, "output_length": null}', "line 1.*output_length is None"),
        ('{"timestamp": 5, "input_length": 1, "output_length": 1}\n[1]', "line 2.*no JSON object"),
        ('{"timestamp": 5, "input_length": 1, "output', "line 1.*no JSON"),
    ],
)
def test_a_row_that_cannot_be_true_refuses_the_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_trace(write(tmp_path, text), num_rows=5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encoding_line_ends_and_name_change_nothing(tmp_path: Path, encoding: str) -> None:
    other = tmp_path / "other name.csv"
    other.write_bytes(AZURE.replace("\n", "\r\n").replace("4808", "4808.0").encode(encoding))
    here, there = (load_trace(path, num_rows=3) for path in (write(tmp_path, AZURE), other))
    assert there.rows == here.rows
    prompts = [trace_corpus(trace, tmp_path / "x", seed=1).prompts for trace in (here, there)]
    assert prompts[0] == prompts[1]


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(AZURE.replace("4808", "\u00e9").encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_trace(path, num_rows=3)


def test_rows_left_out_are_told_with_the_reason(tmp_path: Path) -> None:
    text = BURSTGPT + "119,4,3,GPT-4,5000,1,5001,Conversation log\n120,4,3,GPT-4,5,1,6,Conversation log\n"
    trace = load_trace(write(tmp_path, text), num_rows=3, max_tokens=1000)
    corpus = trace_corpus(trace, tmp_path / "trace", seed=1, max_tokens=1000)
    assert corpus.left_out == (
        "2 of 5 rows of the trace (40%) were left out: "
        "1 above TRACE_MAX_TOKENS=1000, 1 without prompt or answer"
    )
