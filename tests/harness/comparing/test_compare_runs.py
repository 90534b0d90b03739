"""An interrupted comparison goes on where it stopped, and never reuses runs of another plan."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import measure as measuring
from harness.comparing import compare_runs
from harness.comparing.compare_runs import Ledger, LoadPlan, measure_blocks, plan_digest
from harness.plan.corpus import Corpus, Prompt
from harness.plan.schedule import Arrivals, Load, Schedule, make_schedule
from harness.replay.arm_file import Arm, Measurement
from harness.replay.progress import PlainReporter
from harness.results.manifest import Validity
from harness.results.record import make_table, write_parquet
from harness.settings import HarnessSettings
from tests.harness.comparing.test_comparison import run_rows
from tests.harness.made_rows import made_frame, made_manifest, made_repeat

ARMS = [Arm("a", "a"), Arm("b", "b")]
PROMPTS = (Prompt(id="p", prompt="x", max_tokens=1),)
CORPUS = Corpus(PROMPTS, Path("c"), "s" * 64, "s" * 64)
SCHEDULE: Schedule = make_schedule(PROMPTS, 3, Load(Arrivals.CLOSED, concurrency=1), 1)


class Bench:
    """Stands in for `measure`: writes a file for each run, is told to stop before run number `stops_at`."""

    def __init__(self, folder: Path, stops_at: int | None = None, invalid: tuple[str, ...] = ()) -> None:
        self._folder = folder
        self._stops_at = stops_at
        self._invalid = invalid
        self.made: list[tuple[int, str]] = []

    def measure(self, arm: Arm, *rest: Any, served: object) -> Measurement:
        repeats: Sequence[int] = rest[-1]
        if len(self.made) == self._stops_at:
            raise KeyboardInterrupt
        block, name = repeats[0], str(arm.name)
        self.made.append((block, name))
        rows = run_rows(name, block, 1.0, num=3)
        verdict = Validity(self._invalid)
        manifest = made_manifest(rows, arm=name, validity=verdict, entries=[made_repeat(block)])
        path = self._folder / f"{len(list(self._folder.glob('*.parquet')))}.parquet"
        write_parquet(path, make_table(rows), manifest)
        return Measurement(path, made_frame(rows), manifest, verdict)


def compare(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch, *, blocks: int = 2, resume: bool = True
) -> list[Measurement]:
    monkeypatch.setattr(compare_runs, "measure", bench.measure)
    settings = HarnessSettings()
    ledger = Ledger(folder, plan_digest(ARMS, settings, CORPUS, SCHEDULE), resume=resume)
    (measured,) = measure_blocks(
        [LoadPlan(ARMS, settings, CORPUS, [SCHEDULE] * blocks, ledger)], PlainReporter()
    )
    return measured


def test_an_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Bench(tmp_path, stops_at=3)
    assert len(compare(first, tmp_path, monkeypatch)) == 3
    second = Bench(tmp_path)
    measured = compare(second, tmp_path, monkeypatch)
    assert len(second.made) == 1
    assert sorted((m.manifest.repeats[0].repeat, m.manifest.arm) for m in measured) == [
        (0, "a"), (0, "b"), (1, "a"), (1, "b"),
    ]  # fmt: skip
    # More blocks extend what is there.
    third = Bench(tmp_path)
    assert len(compare(third, tmp_path, monkeypatch, blocks=3)) == 6
    assert {block for block, _ in third.made} == {2}


def test_an_arm_does_all_loads_of_a_block_on_one_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, started, ended = Bench(tmp_path), [], []
    keeps_prompts = False

    @contextmanager
    def start(arm: Arm, *_: object) -> Iterator[tuple[SimpleNamespace, None]]:
        started.append(str(arm.name))
        yield SimpleNamespace(keeps_prompts=keeps_prompts), None
        ended.append(str(arm.name))

    def measure(arm: Arm, *rest: Any, served: Callable[[], AbstractContextManager[object]]) -> Measurement:
        with served():
            assert len(ended) == len(started) - 1, "one at a time"
            return bench.measure(arm, *rest, served=served)

    monkeypatch.setattr(measuring, "_served", start)
    monkeypatch.setattr(compare_runs, "measure", measure)

    def run(name: str) -> None:
        plans = [
            LoadPlan(
                ARMS[:num],
                HarnessSettings(),
                CORPUS,
                [SCHEDULE] * 2,
                Ledger(tmp_path, f"{name}{num}", resume=False),
            )
            for num in (2, 1)
        ]
        started.clear()
        ended.clear()
        closed, spread = measure_blocks(plans, PlainReporter())
        assert (len(closed), len(spread)) == (4, 2)
        assert started == ended

    run("plain")
    assert sorted(started) == ["a", "a", "b", "b"], "a fresh one for each arm and block"
    keeps_prompts = True
    run("cached")
    assert sorted(started) == ["a"] * 4 + ["b"] * 2, "one that has seen the prompts is no fresh one"


def test_a_cut_ledger_loses_the_cut_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(Bench(tmp_path), tmp_path, monkeypatch)
    (path,) = tmp_path.glob("*.runs.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    again = Bench(tmp_path)
    assert len(compare(again, tmp_path, monkeypatch)) == 4
    assert len(again.made) == 1
    # What was added after the cut is there as well.
    last = Bench(tmp_path)
    assert len(compare(last, tmp_path, monkeypatch)) == 4
    assert last.made == []


def test_without_resume_everything_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(Bench(tmp_path), tmp_path, monkeypatch)
    again = Bench(tmp_path)
    compare(again, tmp_path, monkeypatch, resume=False)
    assert len(again.made) == 4


def test_invalid_runs_and_lost_files_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(Bench(tmp_path, invalid=("requests failed",)), tmp_path, monkeypatch)
    again = Bench(tmp_path)
    measured = compare(again, tmp_path, monkeypatch)
    assert len(again.made) == 4
    measured[0].path.unlink()
    last = Bench(tmp_path)
    compare(last, tmp_path, monkeypatch)
    assert len(last.made) == 1


def test_another_plan_has_another_ledger() -> None:
    settings = HarnessSettings()
    plans = {
        plan_digest(ARMS, settings, CORPUS, SCHEDULE),
        plan_digest(ARMS[:1], settings, CORPUS, SCHEDULE),
        plan_digest([Arm("a", "a", {"MAX_BATCH": "8"}), ARMS[1]], settings, CORPUS, SCHEDULE),
        plan_digest(ARMS, settings.model_copy(update={"seed": 9}), CORPUS, SCHEDULE),
    }
    assert len(plans) == 4


def test_a_signal_behind_a_run_leaves_it_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    measured = bench.measure

    def then_told(arm: Arm, *rest: Any, served: object) -> Measurement:
        measurement = measured(arm, *rest, served=served)
        os.kill(os.getpid(), signal.SIGINT)
        return measurement

    monkeypatch.setattr(bench, "measure", then_told)
    (only,) = compare(bench, tmp_path, monkeypatch)
    assert only.was_interrupted
    assert not only.was_cut
    assert bench.made == [(0, str(only.manifest.arm))]
    monkeypatch.setattr(bench, "measure", measured)
    assert len(compare(bench, tmp_path, monkeypatch)) == 4
    assert bench.made.count((0, str(only.manifest.arm))) == 1


def test_a_signal_while_the_service_of_a_whole_run_ends_keeps_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = run_rows("a", 0, 1.0, num=3)
    manifest = made_manifest(rows, arm="a", entries=[made_repeat(0)])
    whole = Measurement(Path("x"), made_frame(rows), manifest, Validity())

    @contextmanager
    def ended_by_a_signal(*_: object) -> Iterator[tuple[SimpleNamespace, None]]:
        yield SimpleNamespace(card="ours"), None
        raise KeyboardInterrupt

    file = SimpleNamespace(is_complete=True, finish=lambda: whole, keep=lambda: "kept", manifest=manifest)
    monkeypatch.setattr(measuring, "_served", ended_by_a_signal)
    monkeypatch.setattr(measuring, "ArmFile", lambda *_: file)
    monkeypatch.setattr(measuring, "_measure_repeat", lambda *_: made_repeat(0))
    settings = HarnessSettings().model_copy(update={"floor": False})
    kept = measuring.measure(ARMS[0], settings, CORPUS, SCHEDULE, PlainReporter(), [0])
    assert kept.was_interrupted
    assert kept.path == whole.path
