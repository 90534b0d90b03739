"""The printed table and the figures that come from the service's own account."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harness.commands.report import render_report
from harness.replay.machine import MachineSample
from harness.results.slo import Slo, parse_limits
from harness.results.steps import summarise_steps
from harness.results.table import render_table, spread
from harness.results.validity import judge
from services.contract.status import StepLine
from tests.harness.made_rows import made_frame, made_manifest, made_repeat, made_row
from tools.cli import main


def test_report_of_two_repeats() -> None:
    rows = [
        made_row(i, sent_s=i, scheduled_s=i, chunk_s=(i + 0.5, i + 1.0), repeat=r)
        for r in (0, 1)
        for i in range(60)
    ]
    manifest = made_manifest(rows, repeats=2)
    frame = made_frame(rows)
    slo = Slo(tuple(parse_limits("ttft_ms=600,ttft_p95_ms=400,total_p99_ms=1")))
    text = render_report(frame, manifest, judge(frame, manifest), Path("x.parquet"), slo)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert ["TTFT, from send (ms)", *["500.0 [500.0-500.0]"] * 2, "n<300", "500.0"] in table
    assert "output tok/s     2.0 [2.0-2.0]" in text
    assert "mean batch size  2.00 [2.00-2.00]" in text
    assert "dead-row share   25.0%" in text
    assert "goodput          1.00 [1.00-1.00] requests/s (100.0 [100.0-100.0] % met all)" in text
    assert "limit            ttft_p95_ms=400: missed (500.0)" in text
    assert "limit            total_p99_ms=1: missed (n<300)" in text
    assert text.splitlines()[-2:] == ["VALID", "rows: x.parquet"]


def test_report_says_when_samples_are_too_few_and_when_gaps_are_between_chunks() -> None:
    rows = [
        made_row(i, sent_s=i, chunk_s=(i, i + 1), chunk_tokens=None, num_output_tokens=4) for i in range(5)
    ]
    manifest = made_manifest(
        rows, service=None, settings={"url": "http://h"}, entries=[made_repeat(steps=None)]
    )
    frame = made_frame(rows)
    text = render_report(frame, manifest, judge(frame, manifest), Path("x.parquet"))
    assert "inter-chunk latency (ms)" in text
    assert "n<60" in text
    assert "mean batch size  -" in text
    assert "dead-row share   -" in text


def test_report_of_nothing_finished() -> None:
    rows = [made_row(0, error="http 500", chunk_s=(), chunk_tokens=())]
    manifest = made_manifest(rows)
    frame = made_frame(rows)
    text = render_report(frame, manifest, judge(frame, manifest), Path("x.parquet"))
    assert "output tok/s     -" in text
    assert "INVALID: 1 of 1 requests failed" in text


def test_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none.parquet"), str(tmp_path / "none.journal.jsonl")]) == 2
    complaints = capsys.readouterr().err
    assert f"lab report: there is no file {tmp_path / 'none.parquet'}\n" in complaints
    assert f"lab report: there is no file {tmp_path / 'none.journal.jsonl'}\n" in complaints


def test_a_run_without_a_row_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.parquet"
    kept = Path(__file__).parents[3] / "docs" / "measured" / "compare-lab-26m.parquet"
    pq.write_table(pq.read_table(kept).slice(0, 0), path)
    assert main(["report", str(path)]) == 2
    assert "hold no row" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama-server", "yardsticks-lab-26m"])
def test_figures_that_are_no_run_say_how_to_read_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[3] / "docs" / "measured" / f"{name}.parquet"
    assert main(["report", str(path)]) == 2
    assert "neither a run nor a comparison: read its rows with pandas.read_parquet" in capsys.readouterr().err


def test_a_limit_that_means_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["report", "x.parquet", "--slo", "ttft=5"])
    assert "'ttft' is no metric; use output_tokens_per_s" in capsys.readouterr().err


def test_tables_line_up() -> None:
    assert render_table(["name", "value"], [["a", "1"], ["longer", "1,000.5"]]).splitlines() == [
        "| name   |   value |",
        "| :----- | ------: |",
        "| a      |       1 |",
        "| longer | 1,000.5 |",
    ]


def test_tables_stay_whole_whatever_a_cell_holds() -> None:
    table = render_table(["arm", "error"], [["a|b", "x\n| forged | row |\x1b[31m\u202e"]])
    assert len(table.splitlines()) == 3
    assert "\\|" in table
    assert not set("\x1b\u202e") & set(table)


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "-"), ([1.0], "1.0"), ([3.0, 1.0], "2.0 [1.0-3.0]"), ([1, 2, 9], "2.0 [1.0-9.0]")],
)
def test_spread(values: list[float], text: str) -> None:
    assert spread(values) == text


def step(number: int, num_rows: int, num_dead_rows: int, duration_s: float) -> StepLine:
    return StepLine(
        step=number, start_s=0.0, duration_s=duration_s, num_rows=num_rows, num_prompt_tokens=0,
        num_decode_tokens=num_rows, num_dead_rows=num_dead_rows, queue_depth=0,
    )  # fmt: skip


def test_steps_are_summed_up() -> None:
    summary = summarise_steps([step(0, 4, 0, 0.01), step(1, 2, 2, 0.02), step(2, 0, 4, 0.03)], 5)
    assert summary is not None
    assert summary.mean_batch_size == pytest.approx(2.0)
    assert summary.dead_row_share == pytest.approx(6 / 12)
    assert summary.median_step_ms == pytest.approx(20)
    assert summary.busy_s == pytest.approx(0.06)
    assert (summary.num_steps, summary.num_dropped) == (3, 5)
    assert summarise_steps([], 0) is None


def test_machine_use_between_two_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.replay.machine.psutil.cpu_count", lambda: 4)
    before = MachineSample(10.0, 1.0, 2.0, 100.0, 5.0, pid=1)
    # 10 s on 4 cores: 20 s busy, of which 2 by the harness and 10 by the service; 1 s stolen.
    after = MachineSample(20.0, 3.0, 12.0, 120.0, 6.0, pid=1)
    use = after.use_since(before)
    assert use.harness_cpu_share == pytest.approx(0.2)
    assert use.other_cpu_share == pytest.approx(8 / 40)
    assert use.steal_share == pytest.approx(1 / 40)


def test_shares_that_cannot_be_known_are_left_open() -> None:
    use = MachineSample(20.0, 3.0, 0.0, 120.0, None, None).use_since(
        MachineSample(10.0, 1.0, 0.0, 100.0, None, None)
    )
    assert (use.steal_share, use.other_cpu_share) == (None, None)
