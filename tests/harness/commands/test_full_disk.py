"""A disk that fills up while a run goes on: the run stops, says what is kept, and every finished row is."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from adapters.base import LabError
from harness.results import line_file, output_dir
from harness.results.record import JOURNAL_SUFFIX, read_journal
from tests.harness.commands.test_bench import REPOSITORY, _plain_environment, only_result  # noqa: F401
from tests.harness.fake_server import FakeServer, model_card
from tools.cli import main

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
    """Stands in for `os`: half of write number `fills_at` is taken, and then nothing, `num_refused` times."""

    def __init__(self, fills_at: int, num_refused: int, *, syncs: bool = True) -> None:
        self._fills_at, self._until = fills_at, fills_at + num_refused
        self._num_writes = 0
        self._syncs = syncs

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        self._num_writes += 1
        if self._num_writes == self._fills_at:
            return os.write(descriptor, data[: len(data) // 2])
        if self._fills_at < self._num_writes <= self._until:
            raise FULL
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        if not self._syncs:
            raise FULL


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("num_refused", [1, 10_000])
def test_rows_that_the_journal_did_not_take_are_in_the_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_processes: int,
    num_refused: int,
) -> None:
    monkeypatch.setattr(line_file, "os", FullDisk(12, num_refused))
    with FakeServer(card=model_card()) as server:
        words = ["--url", server.url, "--requests", "400", "--concurrency", "4"]
        assert main(["bench", *words, "--processes", str(num_processes)]) == 2
    path, manifest, rows = only_result(tmp_path / "out")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lab bench: ")]
    assert said[-1:] == said
    assert re.search(rf"No space left on device; all {len(rows)} rows are kept in {path}$", said[0])
    assert rows["error"].isna().sum() >= 11
    # What was in flight when the run stopped has a row as well; nothing else was asked.
    assert len(rows) < 400 if num_processes == 1 else len(rows) <= 400
    assert manifest.validity is not None
    assert manifest.validity.level == "INVALID"
    assert not list((tmp_path / "out").rglob("*" + JOURNAL_SUFFIX))


def test_rows_that_no_result_takes_are_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(line_file, "os", FullDisk(12, 1))
    with monkeypatch.context() as full, FakeServer(card=model_card()) as server:
        full.setattr(output_dir, "os", FullDisk(0, 0, syncs=False))
        assert main(["bench", "--url", server.url, "--requests", "40", "--concurrency", "4"]) == 2
    (journal,) = (tmp_path / "out").rglob("*" + JOURNAL_SUFFIX)
    num_rows = len(read_journal(journal).rows)
    said = capsys.readouterr().err
    assert f"{num_rows} of {num_rows} rows are kept in {journal}: make room, then" in said
    assert "Traceback" not in said
    assert [p.name for p in journal.parent.iterdir()] == [journal.name]
    assert main(["report", "--recover", str(journal)]) == 1
    assert len(only_result(tmp_path / "out")[2]) == num_rows >= 11


def test_a_limit_of_the_system(tmp_path: Path) -> None:
    """RLIMIT_FSIZE takes what fits of a write and refuses the rest, as a full disk does."""
    out = tmp_path / "out"
    with FakeServer(card=model_card()) as server:
        words = ["--url", server.url, "--requests", "100", "--concurrency", "4"]
        done = subprocess.run(
            [sys.executable, "-m", "tools.cli", "bench", *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
        )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    kept = [len(pd.read_parquet(path)) for path in out.rglob("*.parquet")]
    kept += [len(read_journal(path).rows) for path in out.rglob("*" + JOURNAL_SUFFIX)]
    (told,) = re.findall(r"(\d+)(?: of \d+)? rows are kept in", done.stderr)
    assert kept == [int(told)]
    assert kept[0] >= 15


def test_a_place_without_room_for_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(line_file, "os", FullDisk(1, 10_000))
    with FakeServer(card=model_card()) as server:
        assert main(["bench", "--url", server.url, "--requests", "8", "--concurrency", "4"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_file_that_was_there_stays_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pages" / "x.html"
    path.parent.mkdir()
    path.write_text("before")
    monkeypatch.setattr(output_dir, "os", FullDisk(0, 0, syncs=False))
    with pytest.raises(LabError, match="No space left"), output_dir.whole_file(path) as file:
        file.write(b"after")
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("x.html", "before")]
