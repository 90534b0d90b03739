"""A run is simulated again as it was asked for, and a machine that drifts is not taken for a wrong model."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from adapters.base import ConfigError
from harness.results.record import read_parquet, read_table, write_parquet
from harness.simulator.calibration import Calibration, null_calibration, read_calibration
from harness.simulator.verified import Checked, VerifiedRun, median_errors, render_verified
from harness.simulator.verify import verify, verify_all
from tests.harness.simulator.as_measured import measured
from tools.cli import main


@pytest.fixture
def calibration(monkeypatch: pytest.MonkeyPatch) -> Calibration:
    for name, value in (("NULL_STEP_MS", "8"), ("NULL_ROW_MS", "0.5"), ("NULL_PROMPT_TOKEN_MS", "0.02")):
        monkeypatch.setenv(name, value)
    return null_calibration()


@pytest.mark.parametrize(
    "load",
    [
        ("--concurrency", "6"),
        ("--concurrency", "6", "--think-ms", "400", "--ramp-s", "3"),
        ("--rate", "5", "--arrivals", "gamma", "--cv", "2"),
    ],
)
@pytest.mark.parametrize("variant", ["static", "continuous"])
def test_the_same_requests_come_at_the_same_times(
    variant: str, load: tuple[str, ...], tmp_path: Path, calibration: Calibration
) -> None:
    checks = verify(measured(tmp_path, variant, *load), calibration).checks
    errors = {check.name: check.error for check in checks}
    assert errors == pytest.approx(dict.fromkeys(errors, 0.0))
    assert {"TTFT p95", "TPOT p95"} <= set(errors)


def test_a_run_of_another_backend_is_refused(tmp_path: Path, calibration: Calibration) -> None:
    other = calibration.model_copy(update={"info": calibration.info | {"num_threads": 7}})
    with pytest.raises(ConfigError, match="has num_threads 1, the calibration 7"):
        verify(measured(tmp_path, "continuous"), other)


def test_a_run_with_failed_requests_is_refused(tmp_path: Path, calibration: Calibration) -> None:
    path = measured(tmp_path, "continuous")
    manifest, _ = read_parquet(path)
    table = read_table(path)
    errors = pa.array([*["refused"] * 3, *[None] * (len(table) - 3)], pa.string())
    place = table.column_names.index("error")
    write_parquet(path, table.set_column(place, "error", errors), manifest)
    with pytest.raises(ConfigError, match=r"^3 of the 70 requests of .* failed, and"):
        verify(path, calibration)


def test_what_was_found_is_kept_beside_every_figure(
    tmp_path: Path, calibration: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    run, kept = str(measured(tmp_path, "continuous")), tmp_path / "cal.json"
    assert main(["simulate", "--calibrate", run, "--save-calibration", str(kept)]) == 0
    other = str(measured(tmp_path, "dynamic"))
    asked = ["simulate", "--calibrate", str(kept), "--out", str(tmp_path / "out")]
    before = read_calibration(kept)
    assert "not verified" in before.in_words()
    main([*asked, "--verify", other, "--save-calibration", str(kept)])
    after = read_calibration(kept)
    assert after.verified is not None
    assert (after.digest, after.verified.num_runs) == (before.digest, 1)
    assert after.known_errors is after.verified
    assert after.model_copy(update={"tokens_per_byte": 2.0}).known_errors is None, "of another calibration"
    capsys.readouterr()
    assert main([*asked, "--variants", "continuous", "--requests", "20"]) == 0
    printed = capsys.readouterr().out
    assert "output tok/s ±" in printed
    assert "median errors on 1 measured runs: output tok/s" in printed


def checked(measured: float, simulated: float, *repeats: float) -> Checked:
    return Checked("output tok/s", measured, simulated, 0.02, repeats)


def test_nobody_can_tell_where_repeats_differ_by_more_than_the_simulation_is_off() -> None:
    assert checked(100, 110, 100).is_off
    assert checked(100, 110, 100, 120).cannot_tell  # 110 is their mean
    assert not checked(100, 110, 100, 120).is_off
    steady = checked(100, 110, 100, 101)
    assert steady.is_off
    assert not steady.cannot_tell
    assert not checked(110, 110, 100, 120).is_beyond


def test_a_missing_percentile_is_not_wrong_and_a_missing_figure_is() -> None:
    few = Checked("TTFT p95", None, 3.0, 0.2)
    assert (few.is_beyond, few.text()) == (False, "-")
    assert Checked("dead share", 0.0, 0.1, 0.0005).is_off
    assert not Checked("dead share", 0.0, 0.0, 0.0005).is_off


def test_the_table_names_repeats_and_the_order_of_arms() -> None:
    def run(name: str, measured: float, simulated: float, *repeats: float) -> VerifiedRun:
        return VerifiedRun(name, "8 users", 0.0, (checked(measured, simulated, *repeats),), "same")

    fast = [run("continuous", value, 110, 100, 120) for value in (100, 120)]
    slow, same = run("static", 50, 50, 50), run("dynamic", 50.5, 49, 50.5)
    told = render_verified([*fast, slow, same])
    assert "100 -> 110 (+10.0%) ?" in told
    assert "+0.0% (repeats differ by 18.2%)" in told
    assert "1 of 4 runs off by more than 2% (!), 2 more where" in told
    # static and dynamic are as good as equal.
    assert "2 of 2 pairs of arms" in told
    assert median_errors([slow, same]).median_errors["output tok/s"] == pytest.approx(0.0149, abs=0.001)


def test_repeats_are_runs_of_the_same_requests(tmp_path: Path, calibration: Calibration) -> None:
    one, other = (measured(tmp_path, "continuous", "--seed", seed) for seed in ("1", "2"))
    runs = verify_all([one, one, other], calibration)
    assert [len(run.checks[0].repeats) for run in runs] == [2, 2, 1]
