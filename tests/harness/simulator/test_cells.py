"""A cell is played by any process, in any folder, as it would have been where the command runs."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from harness.commands import simulate
from harness.simulator.cells import Cell, Outcome, play, play_all, with_whole_paths


def lines(
    capsys: pytest.CaptureFixture[str], *options: str, play_cells: simulate.PlayAll = play_all
) -> list[str]:
    parser = argparse.ArgumentParser()
    simulate.add_arguments(parser)
    asked = ["--calibrate", "null", "--brief", "--requests", "70", "--variants", "static", "continuous"]
    assert simulate.run(parser.parse_args([*asked, *options]), play_cells) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> simulate.PlayAll:
    """Plays cells as another process does that has an environment and a folder of its own."""

    def play_there(cells: Iterable[Cell], _: int) -> Iterator[Outcome]:
        sent = pickle.dumps([with_whole_paths(cell) for cell in cells])
        (folder := tmp_path / "elsewhere").mkdir()
        with monkeypatch.context() as other:
            other.chdir(folder)
            other.setenv("MAX_BATCH", "2")
            other.setenv("ORDER", "sjf")
            other.setenv("KV_CAPACITY_TOKENS", "4096")
            yield from map(play, pickle.loads(sent))

    return play_there


def test_the_environment_counts_where_the_command_runs(
    elsewhere: simulate.PlayAll, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = lines(capsys)
    monkeypatch.setenv("MAX_BATCH", "4")
    expected = lines(capsys)
    assert expected != usual
    assert lines(capsys, play_cells=elsewhere) == expected


def test_a_corpus_is_found_from_another_folder(
    elsewhere: simulate.PlayAll,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = [{"id": f"p{i}", "prompt": "x" * (i + 1), "max_tokens": 5 + i} for i in range(9)]
    Path("own.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    options = ("--corpus", "own.jsonl", "--allow-changed-corpus")
    assert lines(capsys, *options, play_cells=elsewhere) == lines(capsys, *options)


def test_no_secret_goes_with_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hush-hush-hush-hush")
    parser = argparse.ArgumentParser()
    simulate.add_arguments(parser)

    def look(cells: Iterable[Cell], _: int) -> Iterator[Outcome]:
        assert b"hush" not in pickle.dumps(list(cells))
        raise InterruptedError

    args = parser.parse_args(["--calibrate", "null", "--brief", "--requests", "8"])
    with pytest.raises(InterruptedError):
        simulate.run(args, look)
