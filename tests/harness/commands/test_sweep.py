"""Sweeps: when a server is saturated, where the search goes next, and what is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.commands.sweep import Point, knee
from harness.comparing.capacity import is_saturated, next_load
from harness.replay.arm_file import Measurement
from harness.results.manifest import Validity
from tests.harness.commands.test_bench import _plain_environment  # noqa: F401
from tests.harness.fake_server import FakeServer, model_card, slowly
from tests.harness.made_rows import made_frame, made_manifest, made_row
from tools.cli import main


def open_loop(rate: float, serves_per_s: float, num: int = 100) -> Measurement:
    """One request after the other at most `serves_per_s` of them."""
    rows, free_s = [], 0.0
    for index in range(num):
        scheduled_s = index / rate
        free_s = max(free_s, scheduled_s) + 1 / serves_per_s
        rows.append(made_row(index, scheduled_s=scheduled_s, sent_s=scheduled_s, chunk_s=(free_s, free_s)))
    return Measurement(Path("x"), made_frame(rows), made_manifest(rows), Validity())


@pytest.mark.parametrize(("rate", "saturated"), [(2.0, False), (9.0, False), (12.0, True), (40.0, True)])
def test_saturation_is_a_queue_that_grows(rate: float, saturated: bool) -> None:
    assert is_saturated(open_loop(rate, 10.0).rows) is saturated


def test_the_search_halves_what_is_left() -> None:
    assert next_load([1, 2], [8], is_open=True) == pytest.approx(4.0)
    assert next_load([1, 2], [8], is_open=False) == 5.0
    assert next_load([7], [8], is_open=False) is None
    assert next_load([], [1, 2], is_open=True) is None
    assert next_load([1, 2], [], is_open=True) is None


def test_the_knee_is_where_throughput_for_latency_is_best() -> None:
    points = []
    for load, tokens_per_s, total_ms in ((1, 100.0, 100.0), (4, 350.0, 120.0), (16, 420.0, 600.0)):
        rows = [made_row(0, chunk_s=(0.0, total_ms / 1e3))]
        measured = Measurement(Path("x"), made_frame(rows), made_manifest(rows), Validity())
        points.append(Point(load, measured, tokens_per_s, False, None))
    assert knee(points) == 4
    assert knee(points[:2]) is None


def test_a_sweep_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(slowly(0.002), card=model_card()) as server:
        words = ["--url", server.url, "--requests", "64", "--warmup", "0", "--concurrency", "2", "8"]
        assert main(["sweep", *words, "--slo", "ttft_p95_ms=10000"]) == 0
    shown = capsys.readouterr().out
    assert "highest load that met ttft_p95_ms=10000: 8 users" in shown
    files = re.findall(r"\S+\.parquet", shown)
    assert len(files) == 2
    assert main(["report", *files, "--markdown"]) == 0
    report = capsys.readouterr().out
    assert "2 users" in report
    assert "8 users" in report


def test_a_trace_cannot_be_swept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be replayed as it is at every load."""
    monkeypatch.setenv("TRACE", "azure.csv")
    assert main(["sweep", "--rates", "1", "2"]) == 2
    assert "TRACE is azure.csv, but a sweep sets the load itself: unset it" in capsys.readouterr().err
