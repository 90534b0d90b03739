"""`lab simulate`: what it prints and writes, and that nothing takes it for measured."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from harness.comparing.combine import compare_files
from harness.results.manifest import RunManifest
from harness.results.record import read_parquet, read_table, write_parquet
from harness.results.steps import STEPS_SUFFIX, read_steps
from harness.simulator.calibration import DEFAULT, read_calibration
from tools.cli import main


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[Path]:
    for name, value in (("NULL_STEP_MS", "8"), ("NULL_ROW_MS", "0.5"), ("NULL_PROMPT_TOKEN_MS", "0.02")):
        monkeypatch.setenv(name, value)
    asked = ["--calibrate", "null", "--requests", "64", "--concurrency", "8", "--out", str(tmp_path)]
    assert main(["simulate", *asked, "--variants", "continuous@ORDER=hrrn,MAX_BATCH=4", "static"]) == 0
    printed = capsys.readouterr().out
    assert "SIMULATED, not measured" in printed
    return [Path(line.removeprefix("rows: ")) for line in printed.splitlines() if line.startswith("rows: ")]


def test_its_files_are_those_of_a_run_and_say_what_they_are(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, rows = read_parquet(files[0])
    assert isinstance(manifest, RunManifest)
    assert manifest.kind == "simulated"
    assert manifest.arm == "continuous ORDER=hrrn MAX_BATCH=4"
    assert (len(rows), set(rows["replica"]), rows["error"].notna().sum()) == (64, {0}, 0)
    assert set(rows["router"]) == {"round_robin"}
    assert len(read_steps(files[0].with_suffix(STEPS_SUFFIX))) == manifest.repeats[0].steps.num_steps  # type: ignore[union-attr]
    assert main(["report", str(files[0])]) == 0
    assert "caution: simulated, not measured" in capsys.readouterr().out


def test_a_comparison_with_a_measured_run_is_invalid(files: list[Path], tmp_path: Path) -> None:
    manifest, _ = read_parquet(files[0])
    assert isinstance(manifest, RunManifest)
    manifest.kind = None
    measured = tmp_path / "measured.parquet"
    write_parquet(measured, read_table(files[0]), manifest)
    invalid = compare_files([files[1], measured]).manifest.validity.invalid
    assert any("kinds (measured, simulated)" in reason for reason in invalid)


def test_a_simulated_run_is_neither_calibrated_on_nor_verified(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--calibrate", "--verify"):
        assert main(["simulate", option, str(files[0])]) == 2
        assert "is simulated" in capsys.readouterr().err


def test_the_committed_calibration_can_be_read() -> None:
    assert read_calibration(DEFAULT).cost.kind == "fitted"


def test_a_brief_run_writes_no_rows_and_says_how_fast_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["simulate", "--brief", "--requests", "1500", "--rate", "60", "--replicas", "2"]
    assert main([*asked, "--variants", "continuous", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "continuous: 1,500 requests, " in printed
    assert " events/s" in printed
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_sweep_simulates_every_arm_with_every_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["simulate", "--brief", "--requests", "20", "--variants", "continuous", "static"]
    swept = ["--sweep", "rate=2,8", "--sweep", "MAX_BATCH=4,16"]
    assert main([*asked, *swept, "--out", str(tmp_path)]) == 0
    arms = [
        line.split("|")[1].strip()
        for line in capsys.readouterr().out.splitlines()
        if "MAX_BATCH=" in line and "|" in line
    ]
    assert arms == [
        f"{arm} rate={rate} MAX_BATCH={size}"
        for rate in ("2.0", "8.0") for size in (4, 16) for arm in ("continuous", "static")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--failures", "every_s=10", "for_s must be given"),
        ("--failures", "every_s=0,for_s=1", "every_s must be a number above 0"),
        ("--autoscale", "goal=3", "'goal' is none of target, least, most"),
        ("--autoscale", "target=3,most=x", "most must be a number above 0"),
        ("--autoscale", "target=3,least=5,most=2", "least must not be above most"),
        ("--autoscale", "target=3,every_s=0.00001", "every_s must be at least 0.01"),
        ("--cost-scales", "0", "each of --cost-scales above 0"),
        ("--sweep", "speed=1,2", "'speed' cannot be swept"),
        ("--calibrate", "roofline:lab-9b,gb_per_s=1,tflops=1,memory_gb=1", "'lab-9b' is no preset"),
        (
            "--calibrate",
            "roofline:lab-8b,gb_per_s=1,tflops=1,memory_gb=16",
            "16 GB do not hold lab-8b (16.1 GB)",
        ),
        ("--calibrate", "roofline:lab-8b,gb_per_s=1", "tflops, memory_gb must be given"),
        ("--sweep", "SEED=1,2", "'SEED' cannot be swept"),
        ("--sweep", "VARIANT=static", "'VARIANT' cannot be swept"),
        ("--sweep", "DTYPE=fp32", "DTYPE=fp32 is not simulated: the calibration is of bfloat16"),
        ("--sweep", "N_THREADS=2", "N_THREADS=2 is not simulated: the calibration is of 1"),
        ("--sweep", "replicas=1,0", "the values of replicas must be above 0"),
        ("--sweep", "router=random,foo", "there is no router 'foo'"),
        ("--sweep", "MAX_BATCH=8,x", "MAX_BATCH"),
        ("--sweep", "MODEL=lab-110m", "MODEL=lab-110m is not simulated: the calibration is of lab-26m"),
        ("--info-delay-ms", "nan", "--info-delay-ms must be 0 or more"),
        ("--seeds", "0", "--seeds and --jobs must be at least 1"),
        ("--variants", "continuous@PREFIX_CACHE=1,KV_POLICY=paged", "PREFIX_CACHE=1 is not simulated"),
        ("--variants", "continuous@BACKEND=vllm,SCHEDULING=engine", "SCHEDULING=engine is not simulated"),
    ],
)
def test_numbers_of_a_fleet_that_cannot_be_are_refused(
    option: str, value: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):  # of argparse; the others are the command's own
        assert main(["simulate", option, value]) == 2
    assert told in capsys.readouterr().err


def test_sweeps_that_would_change_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for asked, told in (
        (["--sweep", "rate=2", "--sweep", "rate=4"], "rate is swept twice"),
        (["--sweep", "concurrency=2,4", "--rate", "3"], "an open loop has no users"),
        (
            ["--variants", "continuous@MAX_BATCH=4", "static", "--sweep", "MAX_BATCH=8,16"],
            "continuous@MAX_BATCH=4 sets MAX_BATCH itself",
        ),
    ):
        assert main(["simulate", "--calibrate", "null", *asked]) == 2
        assert told in capsys.readouterr().err


def test_a_fleet_that_answers_nothing_has_no_price(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--brief",
        "--requests",
        "8",
        "--variants",
        "continuous@MAX_MODEL_LEN=2",
        "--price-per-hour",
        "2",
    ]
    assert main(["simulate", "--calibrate", "null", *asked]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| continuous")]
    assert "100.0%" in line
    assert line.split("|")[-2].strip() == "-"


def test_seeds_run_in_processes_and_give_means_with_their_extremes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "simulate",
        "--requests",
        "70",
        "--rate",
        "4",
        "--variants",
        "continuous",
        "--slo",
        "ttft_p95_ms=1",
    ]
    lines = []
    for more in (["--seeds", "2", "--jobs", "2"], ["--seeds", "2"], ["--seed", "1"]):
        assert main([*asked, *more, "--price-per-hour", "3", "--out", str(tmp_path / "-".join(more))]) == 0
        printed = capsys.readouterr().out
        lines.append(next(line for line in printed.splitlines() if line.startswith("| continuous")))
        assert "USD per million tokens" in printed
        assert printed.count("rows: ") == len(set(tmp_path.glob(f"{'-'.join(more)}/*/*/*Z-??????.parquet")))
    assert lines[0] == lines[1]
    assert "misses ttft_p95_ms=1" in lines[0]
    second_of_two = lines[2].split("|")[2].strip()
    assert second_of_two in lines[0]


def test_a_data_sheet_is_simulated_and_named_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "roofline:lab-8b,gb_per_s=1000,tflops=100,memory_gb=40"
    asked = ["--variants", "baseline", "--concurrency", "1", "--requests", "4", "--out", str(tmp_path)]
    assert main(["simulate", "--calibrate", source, *asked]) == 0
    printed = capsys.readouterr().out
    assert "an analytic model, nothing measured stands behind it" in printed
    (figure,) = re.findall(r"^\| baseline *\| *([0-9.]+) ", printed, re.MULTILINE)
    # 16.06 GB of weights, 1.05 of them the embedding, at 1,000 GB/s: 66.6 steps a second, each a token.
    assert 60 < float(figure) < 66.7
