"""`lab gate --against-commit`: services of two commits in turns, judged at once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from adapters.base import ConfigError
from harness.commands import gate_commit
from harness.comparing import compare_runs
from harness.plan.corpus import REPOSITORY
from harness.replay import checkout, provenance
from harness.replay.arm_file import Arm, Measurement
from harness.results.manifest import ComparisonManifest, Validity
from harness.results.record import make_table, read_parquet, write_parquet
from tests.harness.commands.test_bench import write_corpus
from tests.harness.comparing.test_comparison import run_rows
from tests.harness.made_rows import made_frame, made_manifest, made_repeat
from tools.cli import main

STEP = "self._step_s = options.null_step_ms / 1000\n"
WORDS = ["--requests", "16", "--concurrency", "4", "--max-regression", "30%", "--metrics", "output-tok/s"]
NULL = {"BACKEND": "null", "NULL_STEP_MS": "40", "OUT": "out", "FLOOR": "0", "WARMUP": "2"}


def git(tree: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-C", str(tree))
    return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits of this code: `same`, and `quick`, whose null backend is 20 times as fast."""
    tree = tmp_path_factory.mktemp("repository")
    for name in ("adapters", "services", "harness", "tools"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "uv.lock", tree)
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "same")
    git(tree, "tag", "same")
    backend = tree / "adapters" / "null_backend.py"
    text = backend.read_text()
    assert STEP in text
    backend.write_text(text.replace(STEP, STEP.replace("1000", "20000")))
    git(tree, "commit", "--quiet", "-am", "quick")
    git(tree, "tag", "quick")
    return tree


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORPUS", str(write_corpus(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(checkout, "REPOSITORY", repository)
    for name, value in NULL.items():
        monkeypatch.setenv(name, value)


def test_a_slower_step_is_found(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "--against-commit", "quick", *WORDS]) == 1
    shown = capsys.readouterr().out
    sha = git(repository, "rev-parse", "quick")
    assert "REGRESSION" in shown
    assert f"old: quick ({sha[:12]}); measured in turns; the same uv.lock" in shown
    (path,) = (tmp_path / "out" / "compare").glob("*.parquet")
    manifest, _ = read_parquet(path)
    assert isinstance(manifest, ComparisonManifest)
    assert manifest.reference == f"continuous at {sha[:12]}"
    assert {run.git.sha for run in manifest.runs} == {sha, provenance.git_state().sha}
    # Each block measured both, and no worktree is left.
    assert len(manifest.runs) == 2 * manifest.num_blocks
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_the_same_commit_is_no_regression(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "--against-commit", "same", *WORDS]) in (0, 3)
    assert "REGRESSION" not in capsys.readouterr().out


class Blocks:
    """Stands in for `measure`: this tree takes 1.2 times as long, and block 0 is disturbed.

    With `noise` each block has its own, of 8% either way, in place of the disturbance.
    """

    def __init__(self, folder: Path, *, noise: bool = False) -> None:
        self._folder = folder
        self._noise = noise
        self.made: list[tuple[int, str]] = []

    def _step_s(self, block: int) -> float:
        if self._noise:
            return 1.2 * (1.08 if block // 2 % 2 else 1 / 1.08)
        return 2.0 if block == 0 else 1.2

    def measure(self, arm: Arm, *rest: Any, served: object) -> Measurement:
        block, name = rest[-1][0], str(arm.name)
        self.made.append((block, name))
        step_s = 1.0 if arm.source else self._step_s(block)
        rows = run_rows(name, block, step_s + block / 1000)
        facts = {"validity": Validity(), "entries": [made_repeat(block)], "schedule": {"digest": "s" * 64}}
        manifest = made_manifest(rows, arm=name, **facts)
        path = self._folder / f"{len(self.made)}.parquet"
        write_parquet(path, make_table(rows), manifest)
        return Measurement(path, made_frame(rows), manifest, Validity())


def gate_of(blocks: Blocks, monkeypatch: pytest.MonkeyPatch, limit_s: str) -> int:
    def found(words: Any, pad: str, settings: Any, reporter: Any, source: Any = None) -> list[Arm]:
        return [Arm("continuous", "old" if source else "new", source=source)]

    monkeypatch.setattr(compare_runs, "measure", blocks.measure)
    monkeypatch.setattr(gate_commit, "find_arms", found)
    words = ["--requests", "8", "--metrics", "output-tok/s", "--measure-on", limit_s]
    return main(["gate", "--against-commit", "quick", *words])


@pytest.mark.parametrize(("limit_s", "status"), [("0", 3), ("600", 1)])
def test_it_measures_on_until_it_can_tell(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit_s: str,
    status: int,
) -> None:
    blocks = Blocks(tmp_path)
    assert gate_of(blocks, monkeypatch, limit_s) == status
    num_blocks = len(blocks.made) // 2
    # Every run was made once; one file holds them all.
    assert sorted(blocks.made) == [(b, name) for b in range(num_blocks) for name in ("new", "old")]
    assert (num_blocks > 3) == (status == 1)
    (path,) = (tmp_path / "out" / "compare").glob("*.parquet")
    manifest, _ = read_parquet(path)
    assert isinstance(manifest, ComparisonManifest)
    assert manifest.num_blocks == num_blocks
    shown = capsys.readouterr().out
    assert ("more blocks" in shown) == (status == 3)


def test_it_measures_on_where_only_a_large_difference_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 8 such blocks no 100 would tell of 5%; 20% is told by 12."""
    blocks = Blocks(tmp_path, noise=True)
    assert gate_of(blocks, monkeypatch, "600") == 1
    assert len(blocks.made) // 2 > 8


def test_what_is_no_commit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "--against-commit", "no-such-tag"]) == 2
    assert "no commit 'no-such-tag'" in capsys.readouterr().err


def test_packages_are_installed_only_where_uv_lock_differs(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}:/usr/bin:/bin")
    with checkout.checked_out("same", ["torch"]) as same:
        assert not (tmp_path / "asked").exists()
        assert "same uv.lock" in same.packages
    (repository / "uv.lock").write_text("other\n")
    with checkout.checked_out("same", ["torch"]) as other:
        assert other.python == str(other.folder / ".venv" / "bin" / "python")
        words = (tmp_path / "asked").read_text()
        assert f"--project {other.folder} " in words
        assert "--extra torch" in words
    git(repository, "checkout", "--quiet", "uv.lock")
    assert not other.folder.exists()
    uv.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    (repository / "uv.lock").write_text("other\n")
    with pytest.raises(ConfigError, match="no such package"), checkout.checked_out("same", []):
        pass
    git(repository, "checkout", "--quiet", "uv.lock")
