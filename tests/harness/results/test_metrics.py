"""A metric is one entry of the table, and stands in reports, comparisons, sweeps, the gate, the page,
OpenMetrics and `--slo`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.commands.report import render_report
from harness.commands.sweep import Point, render_sweep
from harness.comparing.comparison import render_comparison
from harness.page.data import gather
from harness.page.files import to_markdown
from harness.replay.arm_file import Measurement
from harness.results.cost import Price
from harness.results.formulas import Samples
from harness.results.metrics import METRICS, Metric, column
from harness.results.openmetrics import write_openmetrics
from harness.results.slo import Slo, parse_limits
from harness.results.validity import Validity, judge
from tests.harness.commands.test_gate import write_file
from tests.harness.comparing.test_comparison import comparison, run_rows
from tests.harness.made_rows import made_frame, made_manifest
from tools.cli import main


def longest_stall(rows: pd.DataFrame) -> Samples:
    """The longest gap between two chunks of a request, in ms."""
    stalls = [max(np.diff(stamps), default=np.nan) * 1e3 for stamps in rows["chunk_s"]]
    return Samples(np.asarray(stalls, dtype=float), np.arange(len(rows)))


TOYS = (
    Metric(
        name="stall", unit="ms", label="stall", description="Longest stall.",
        samples=longest_stall, compared=(50,), decides=True,
    ),
    Metric(
        name="words", unit="per_s", label="words/s", description="Words a second.",
        of_run=lambda rows, is_open: float(len(rows)), compared=(None,), higher_is_better=True,
    ),
)  # fmt: skip


@pytest.fixture
def toys() -> Iterator[None]:
    METRICS.extend(TOYS)
    yield
    for toy in TOYS:
        METRICS.remove(toy)


ROWS = run_rows("continuous", 0, 1.0)
LIMITS = "stall_ms=400,stall_p95_ms=600,words_per_s=61"


def slo(text: str) -> Slo:
    return Slo(tuple(parse_limits(text)))


def cells(header: str, line: str) -> dict[str, str]:
    return dict(zip(*([cell.strip() for cell in row.split("|")] for row in (header, line)), strict=True))


@pytest.mark.usefixtures("toys")
def test_a_report_shows_it_and_holds_it_against_limits() -> None:
    frame, manifest = made_frame(ROWS), made_manifest(ROWS)
    text = render_report(frame, manifest, judge(frame, manifest), Path("x"), slo(LIMITS))
    (row,) = (line for line in text.splitlines() if line.startswith("| stall"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["500.0 [500.0-500.0]"] * 2 + ["n<300", "500.0"]
    assert "words/s          60.0" in text
    assert "goodput          0.00 requests/s (0.0 % met all)" in text
    assert "limit            stall_p95_ms=600: met (500.0)" in text
    assert "limit            words_per_s=61: missed (60.0)" in text


@pytest.mark.usefixtures("toys")
def test_a_comparison_shows_it_and_judges_it_if_it_decides() -> None:
    runs = [run_rows(arm, block, s) for block in (0, 1, 2) for arm, s in (("baseline", 1.0), ("other", 0.5))]
    rows, manifest = comparison(*runs)
    text = render_comparison(made_frame(rows), manifest)
    figures, ratios = (line for line in text.splitlines() if line.startswith("| arm"))
    assert "stall p50 (ms)" in figures
    assert "words/s" in figures
    assert "stall p50" in ratios
    assert "words/s" not in ratios
    assert "stall p50 (0.50x)" in text


@pytest.mark.usefixtures("toys")
def test_a_sweep_shows_it_and_searches_by_it() -> None:
    measured = Measurement(Path("x"), made_frame(ROWS), {}, Validity())
    limits = slo("stall_p50_ms=499")
    met = limits.are_met(measured.rows, is_open=False)
    text = render_sweep([Point(1.0, measured, 2.0, False, met)], limits, is_open=False)
    header, _, line, *rest = text.splitlines()
    shown = cells(header, line)
    assert (shown["stall p50"], shown["words/s"], shown["met SLO"]) == ("500.0", "60.0", "no")
    assert "highest load that met stall_p50_ms=499: none" in rest[-1]


@pytest.mark.usefixtures("toys")
def test_the_gate_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_file(tmp_path / "old.parquet", 1.0, 1.01, 0.99, 1.0)
    new = write_file(tmp_path / "new.parquet", 1.2, 1.21, 1.19, 1.2, sha="b" * 40)
    for name, status in (("stall-p50", 1), ("words/s", 0), ("tpot-p95", 1), ("tpot_p95_ms", 1)):
        assert (
            main(["gate", str(new), "--against", str(old), "--allow-sessions", "--metrics", name]) == status
        ), name
    shown = capsys.readouterr().out
    assert "| stall p50 | 1.20x" in shown
    assert "| words/s | 1.00x" in shown
    assert main(["gate", str(new), "--against", str(old), "--metrics", "speed"]) == 2
    assert "no metric is called speed; there are output_tokens_per_s, " in capsys.readouterr().err


@pytest.mark.usefixtures("toys")
def test_the_page_has_it() -> None:
    rows, manifest = comparison(run_rows("baseline", 0, 1.0), run_rows("other", 0, 0.5))
    for number, run in enumerate(manifest.runs):
        run.run_id, run.path = f"run-{number}", "none.parquet"
    for row in rows:
        row["run_id"] = f"run-{int(row['arm'] == 'other')}"
    data = gather(made_frame(rows), manifest, slo=slo(LIMITS), price=Price())
    arm, _ = data.arms
    assert arm.figures["stall_p95_ms"] == pytest.approx(500.0)
    assert arm.figures["words_per_s"] == 60.0
    header, _, line, *_ = (line for line in to_markdown(data).splitlines() if line.startswith("|"))
    shown = cells(header, line)
    assert (shown["stall p50"], shown["words/s"]) == ("500.0", "60.0")
    assert (shown["stall_p95_ms=600"], shown["words_per_s=61"]) == ("met", "missed")


@pytest.mark.usefixtures("toys")
def test_the_openmetrics_file_has_it(tmp_path: Path) -> None:
    path = write_openmetrics(tmp_path / "run.parquet", made_frame(ROWS), made_manifest(ROWS))
    text = path.read_text(encoding="utf-8")
    assert "# HELP lab_run_stall_seconds Longest stall." in text
    assert "lab_run_words_per_second{" in text


def test_names_and_labels_are_each_of_one_metric() -> None:
    assert len({metric.name for metric in METRICS}) == len({m.label for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert (metric.samples is None) != (metric.of_run is None)
        assert metric.compared or not metric.decides


def test_the_table_says_what_decides() -> None:
    deciding = [(metric.name, metric.compared) for metric in METRICS if metric.decides]
    assert deciding == [
        ("output_tokens", (None,)), ("request_time", (None,)), ("ttft", (50, 95)), ("tpot", (50, 95)),
        ("total", (95,)), ("itl", (99,)), ("longest_stall", (95,)),
    ]  # fmt: skip


def test_a_failed_request_has_no_value() -> None:
    rows = made_frame([ROWS[0], ROWS[1] | {"error": "http 500"}])
    values = column("ttft_sched_ms")(rows).values
    assert np.isnan(values).tolist() == [False, True]
