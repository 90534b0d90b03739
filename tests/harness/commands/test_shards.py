"""Parts of a schedule: by shard or by process, together they are the whole."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest

from adapters.base import ConfigError, LabError
from harness.plan.corpus import Prompt
from harness.plan.schedule import Arrivals, Load, make_schedule
from harness.replay import processes
from harness.results.manifest import RunManifest
from harness.results.record import read_parquet
from harness.settings import HarnessSettings
from tests.harness.commands.test_bench import _plain_environment, only_result, validity_of  # noqa: F401
from tests.harness.fake_server import FakeServer, model_card
from tools.cli import main

PROMPTS = [Prompt(id=f"p{i}", prompt=f"prompt {i}", max_tokens=1 + i % 4) for i in range(10)]


@pytest.mark.parametrize("load", [Load(Arrivals.POISSON, rate=20.0), Load(Arrivals.CLOSED, concurrency=7)])
def test_shards_merged_are_the_schedule(load: Load) -> None:
    whole = make_schedule(PROMPTS, 50, load, seed=3)
    parts = [whole.part(index, 3) for index in range(3)]
    merged = sorted((r for part in parts for r in part.requests), key=lambda r: r.index)
    assert tuple(merged) == whole.requests
    assert {part.digest for part in parts} == {whole.digest}
    assert sum(part.num_users for part in parts) == whole.num_users
    # A shard that is sent by two processes is split once more.
    assert parts[1].part(1, 2).shard == (4, 6)
    assert parts[1].part(1, 2).requests == whole.part(4, 6).requests


def test_users_cannot_be_split_into_more_parts_than_there_are() -> None:
    with pytest.raises(ConfigError, match="2 users cannot be split into 3 parts"):
        make_schedule(PROMPTS, 9, Load(Arrivals.CLOSED, concurrency=2), seed=3).part(0, 3)


def test_the_index_of_a_job_names_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    assert HarnessSettings().which_shard() == (0, 1)
    assert HarnessSettings(shards=4).which_shard() == (2, 4)
    assert HarnessSettings(shard="0/2").which_shard() == (0, 2)
    with pytest.raises(ConfigError, match="numbered 0 to 1"):
        HarnessSettings(shards=2).which_shard()
    with pytest.raises(ConfigError, match="SHARD=0/0: there must be at least 1 part"):
        HarnessSettings(shard="0/0").which_shard()


def test_three_shards_make_the_run(tmp_path: Path) -> None:
    with FakeServer(card=model_card()) as server:
        words = ["--url", server.url, "--requests", "31", "--rate", "300", "--warmup", "0"]
        # A busy machine may send late, which makes a run INVALID; what was sent is the question here.
        for index in range(3):
            code = main(["bench", *words, "--shard", f"{index}/3", "--out", str(tmp_path / f"s{index}")])
            assert code in (0, 1)
        assert main(["bench", *words, "--out", str(tmp_path / "whole")]) in (0, 1)
    files = [only_result(tmp_path / f"s{index}")[0] for index in range(3)]
    out = tmp_path / "merged.parquet"
    assert main(["merge", *map(str, files), "--out", str(out)]) == 0
    manifest, rows = read_parquet(out)
    assert isinstance(manifest, RunManifest)
    _, whole_manifest, whole = only_result(tmp_path / "whole")
    assert manifest.schedule.digest == whole_manifest.schedule.digest
    planned = [
        "schedule_index",
        "prompt_id",
        "offset_s",
        "max_tokens",
        "seed",
        "body_sha256",
        "output_sha256",
    ]
    expected = whole.sort_values("schedule_index", ignore_index=True)
    assert rows[planned].equals(expected[planned])
    assert rows["scheduled_s"].to_list() == pytest.approx(rows["offset_s"].to_list(), abs=1e-6)
    assert main(["merge", str(files[0]), str(files[1]), "--out", str(out)]) == 2
    assert main(["merge", *map(str, files), str(files[0]), "--out", str(out)]) == 2


def test_late_shards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(card=model_card()) as server:
        words = ["--url", server.url, "--requests", "4", "--rate", "100", "--warmup", "0", "--shard", "0/2"]
        assert main(["bench", *words, "--start-at", f"{time.time() - 5:.3f}"]) == 2
    assert "late for START_AT" in capsys.readouterr().err


def test_more_processes_than_users_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with FakeServer(card=model_card()) as server:
        words = ["--url", server.url, "--processes", "2", "--concurrency", "1"]
        assert main(["bench", *words]) == 2
        assert server.bodies == []
    assert "1 users cannot be split into 2 parts" in capsys.readouterr().err


def ready_and_stuck(line: Connection, part: object) -> None:
    line.send("ready")
    line.recv()
    time.sleep(60)


def test_when_one_process_fails_the_others_are_ended_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Connection] = []
    failed_s: list[float] = []

    def collect(found: dict[Connection, BaseProcess], on_complete: object) -> NoReturn:
        lines.extend(found)
        failed_s.append(time.monotonic())
        raise EOFError

    monkeypatch.setattr(processes, "_run_worker", ready_and_stuck)
    monkeypatch.setattr(processes, "_collect", collect)
    parts: list[Any] = [None, None, None]
    with pytest.raises(LabError, match="ended before it was done"):
        processes.replay_in_processes(parts, lambda _: None, None)
    assert time.monotonic() - failed_s[0] < 5
    assert [line.closed for line in lines] == [True, True, True]


def test_several_processes_send_the_same_schedule(tmp_path: Path) -> None:
    with FakeServer(card=model_card(client_chunk=2, variant="static")) as server:
        words = ["--url", server.url, "--requests", "24", "--concurrency", "8", "--processes", "2"]
        assert main(["bench", *words]) == 0
    _, manifest, rows = only_result(tmp_path / "out")
    assert validity_of(manifest).invalid == ()
    assert sorted(rows["schedule_index"]) == list(range(24))
    assert set(rows["group_size"]) == {2}
    assert rows.groupby("group_id")["schedule_index"].count().eq(2).all()
    assert rows.groupby("group_id")["schedule_index"].apply(lambda s: s.mod(2).nunique()).eq(1).all()
    assert (rows["sent_s"] >= rows["scheduled_s"]).all()
