"""`lab gate` and comparisons of files: what passes, what fails, and what cannot be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.base import ConfigError
from harness.comparing.combine import compare_files
from harness.results.manifest import Validity
from harness.results.record import make_table, write_parquet
from tests.harness.comparing.test_comparison import comparison, run_rows
from tests.harness.made_rows import made_manifest
from tools.cli import main


def write_file(
    path: Path, *steps_s: float, sha: str = "a" * 40, validity: Validity | None = None, **changes: Any
) -> Path:
    """One repeat for each of `steps_s`, each with answers that take so long."""
    rows = [row for block, step_s in enumerate(steps_s) for row in run_rows("continuous", block, step_s)]
    manifest = made_manifest(
        rows, repeats=len(steps_s), git={"sha": sha}, validity=validity or Validity(), **changes
    )
    write_parquet(path, make_table(rows), manifest)
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_file(tmp_path / "old.parquet", 1.0, 1.01, 0.99, 1.0)


@pytest.mark.parametrize(
    ("steps_s", "status", "word"),
    [
        ((1.0, 1.011, 0.99, 1.001), 0, "pass"),
        ((0.5, 0.51, 0.49, 0.5), 0, "pass"),
        ((1.2, 1.21, 1.19, 1.2), 1, "REGRESSION"),
        ((1.0, 1.6, 0.8, 1.3), 3, "can't tell"),
    ],
)
def test_the_exit_status_tells(
    tmp_path: Path,
    old: Path,
    capsys: pytest.CaptureFixture[str],
    steps_s: tuple[float, ...],
    status: int,
    word: str,
) -> None:
    new = write_file(tmp_path / "new.parquet", *steps_s, sha="b" * 40)
    assert (
        main(
            [
                "gate",
                str(new),
                "--against",
                str(old),
                "--max-regression",
                "5%",
                "--strict",
                "--allow-sessions",
            ]
        )
        == status
    )
    assert word in capsys.readouterr().out


def test_files_of_two_sessions_are_inconclusive(
    tmp_path: Path, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps_s in ((1.0, 1.011, 0.99, 1.001), (1.2, 1.21, 1.19, 1.2)):
        new = write_file(tmp_path / "new.parquet", *steps_s, sha="b" * 40)
        assert main(["gate", str(new), "--against", str(old)]) == 4
    assert "inconclusive: the two files were not measured in turns" in capsys.readouterr().out


@pytest.mark.parametrize(("step_s", "status"), [(1.001, 0), (0.5, 0), (1.2, 1)])
def test_arms_measured_in_turns_pass_or_fail(tmp_path: Path, step_s: float, status: int) -> None:
    runs = [run_rows(arm, b, s + b / 100) for b in range(3) for arm, s in (("old", 1.0), ("new", step_s))]
    rows, manifest = comparison(*runs, reference="old")
    path = tmp_path / "both.parquet"
    write_parquet(path, make_table(rows), manifest)
    assert main(["gate", str(path), "--against-arm", "old"]) == status
    assert main(["gate", str(path), "--against-arm", "other"]) == 2


def test_blocks_that_are_missing_are_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        run_rows(arm, b, s) for b in range(9) for arm, s in (("old", 1.0), ("new", 9.0 if b % 2 else 1.0))
    ]
    rows, manifest = comparison(*runs, reference="old")
    path = tmp_path / "both.parquet"
    write_parquet(path, make_table(rows), manifest)
    assert main(["gate", str(path), "--against-arm", "old", "--strict"]) == 3
    shown = capsys.readouterr().out
    assert "no 100 blocks would tell of output tok/s below" in shown
    assert "measure 1" not in shown


def test_a_slowdown_within_the_limit_passes(tmp_path: Path, old: Path) -> None:
    new = write_file(tmp_path / "new.parquet", 1.2, 1.21, 1.19, 1.2)
    assert (
        main(
            [
                "gate",
                str(new),
                "--against",
                str(old),
                "--max-regression",
                "0.3",
                "--strict",
                "--allow-sessions",
            ]
        )
        == 0
    )


def test_files_that_replayed_something_else_are_refused(tmp_path: Path, old: Path) -> None:
    new = write_file(tmp_path / "new.parquet", 1.0, 1.0, corpus={"sha256": "other", "recorded_sha256": None})
    assert main(["gate", str(new), "--against", str(old)]) == 2


def test_invalid_files_are_refused_unless_told(tmp_path: Path, old: Path) -> None:
    bad = write_file(tmp_path / "bad.parquet", 1.0, 1.0, validity=Validity(("requests failed",)))
    with pytest.raises(ConfigError, match="requests failed"):
        compare_files([old, bad])
    made = compare_files([old, bad], allow_invalid=True)
    assert made.manifest.validity.level == "INVALID"


def test_arms_of_two_files_are_told_apart_by_commit(tmp_path: Path, old: Path) -> None:
    new = write_file(tmp_path / "new.parquet", 1.0, 1.0, sha="b" * 40)
    made = compare_files([old, new])
    assert made.manifest.arms == ["continuous", "continuous bbbbbbbb"]
    assert made.manifest.reference == "continuous"
    assert "not measured in turns" in made.manifest.validity.caution[0]
    assert main(["compare", "--files", str(old), str(new)]) == 0
