"""`lab calibrate` on a backend whose steps are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.simulator.calibration import read_calibration
from tests.harness.simulator.as_measured import measured
from tools.cli import main


def test_the_grid_and_the_run_make_a_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NULL_STEP_MS", "0.1")
    run, out = measured(tmp_path, "continuous"), tmp_path / "cal.json"
    assert main(["calibrate", str(run), "--out", str(out), "--allow-busy", "--grids", "2"]) == 0
    printed = capsys.readouterr().out
    for fit in ("the grid alone", "the run alone", "both"):
        assert f"by a fit to {fit}" in printed
    made = read_calibration(out)
    assert made.fit is not None
    assert made.fit.num_fitted > 1000
    assert made.ranges["decode_context"][1] > 8000
    assert main(["calibrate", "nowhere.parquet", "--out", str(out)]) == 2
