"""The runs of a comparison, in a balanced order, and a ledger by which an interrupted one goes on.

A run that the ledger holds for the same plan (arms, settings, schedule, corpus, commit) is read back instead
of made again, so the same call with more blocks extends a comparison.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, groupby
from pathlib import Path
from typing import NamedTuple

from adapters.base import LabError
from harness.comparing.arms import arm_order
from harness.measure import SharedService, measure
from harness.plan.corpus import Corpus
from harness.plan.load import load_words
from harness.plan.schedule import Schedule
from harness.replay.arm_file import Arm, Measurement
from harness.replay.interrupts import on_interrupt
from harness.replay.progress import Reporter
from harness.replay.provenance import git_state
from harness.results.line_file import LineFile, read_records
from harness.results.manifest import RunManifest
from harness.results.output_dir import make_folder
from harness.results.record import read_parquet
from harness.settings import HarnessSettings


class Ledger:
    """Which run of which block and arm is in which file; each line is on disk before the next run."""

    def __init__(self, folder: Path, plan: str, *, resume: bool) -> None:
        self.path = folder / f"{plan[:12]}.runs.jsonl"
        self.num_damaged = 0
        self._done: dict[tuple[int, str], Path] = {}
        if not resume:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            records, self.num_damaged = read_records(self.path)
            for _, entry in records:
                try:
                    self._done[entry["block"], entry["arm"]] = Path(entry["path"])
                except (LookupError, TypeError):
                    self.num_damaged += 1

    def __len__(self) -> int:
        return len(self._done)

    def add(self, block: int, measurement: Measurement) -> None:
        """
        Raises:
            LabError: the disk is full; the run itself has its file.
        """
        make_folder(self.path.parent)
        entry = {"block": block, "arm": measurement.manifest.arm, "path": str(measurement.path)}
        file = LineFile(self.path, is_new=False)
        try:
            file.append("run", json.dumps(entry).encode())
        finally:
            file.close()
        self._done[block, measurement.manifest.arm] = measurement.path

    def read(self, block: int, arm: Arm) -> Measurement | None:
        """The run of an earlier call; None where it was not made, failed, or its file is gone."""
        path = self._done.get((block, str(arm.name)))
        if path is None:
            return None
        try:
            manifest, rows = read_parquet(path)
        except LabError:
            return None
        validity = manifest.validity
        if not isinstance(manifest, RunManifest) or validity is None or validity.invalid:
            return None
        return Measurement(path, rows, manifest, validity)


def plan_digest(arms: Sequence[Arm], settings: HarnessSettings, corpus: Corpus, schedule: Schedule) -> str:
    content = {
        "arms": [[arm.variant, arm.name, sorted(arm.settings.items())] for arm in arms],
        "settings": settings.recorded(),
        "corpus": corpus.sha256,
        "schedule": schedule.digest,
        "git": git_state().sha,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is measured under one load, and where it is noted."""

    arms: Sequence[Arm]
    settings: HarnessSettings
    corpus: Corpus
    schedules: Sequence[Schedule]
    """One a block."""
    ledger: Ledger


class Turn(NamedTuple):
    """One run to be made."""

    block: int
    arm: Arm
    plan: LoadPlan
    made: list[Measurement]
    """Those of its load, which it joins."""
    kept: Measurement | None
    """Of an earlier call."""


def measure_blocks(plans: Sequence[LoadPlan], reporter: Reporter) -> list[list[Measurement]]:
    """Every arm of every load once in every block; what was measured until an interrupt is returned.

    All loads have the same number of blocks. Within a block an arm does all its loads on one service, which
    need not be started for each; so what the machine does in the long run meets all arms and loads.

    Raises:
        KeyboardInterrupt: told to stop before the first run.
    """
    measured: list[list[Measurement]] = [[] for _ in plans]
    num_blocks = len(plans[0].schedules)
    all_arms = list({str(arm.name): arm for plan in plans for arm in plan.arms}.values())
    turns = [
        Turn(block, arm, plan, made, plan.ledger.read(block, arm))
        for block in range(num_blocks)
        for arm in arm_order(all_arms, block, plans[0].settings.seed)
        for plan, made in zip(plans, measured, strict=True)
        if arm in plan.arms
    ]
    num_runs = sum(turn.kept is None for turn in turns)
    numbers = count(1)
    told: list[bool] = []
    last: list[Measurement] = []  # where the newest run stands
    # A signal between two runs waits until the first is in the ledger; `measure` has its own handler.
    with on_interrupt(lambda: told.append(True)), closing(_with_services(turns, reporter)) as served_turns:
        for (block, arm, plan, made, kept), service in served_turns:
            if kept is not None:
                made.append(kept)
                last = made
                continue
            if told:
                if not last:
                    raise KeyboardInterrupt
                last[-1] = replace(last[-1], stopped_after=True)
                break
            number, schedule = next(numbers), plan.schedules[block]
            words = load_words(schedule.load.rate, schedule.load.concurrency)
            place = f"block {block + 1} of {num_blocks}: {arm.name}, {words}, run {number} of {num_runs}"
            reporter.start_run(place, num_runs - number)
            try:
                made.append(
                    measure(
                        arm, plan.settings, plan.corpus, schedule, reporter, [block], served=service.served
                    )
                )
            except KeyboardInterrupt:
                if not last:
                    raise
                break
            last = made
            if not made[-1].was_cut:
                plan.ledger.add(block, made[-1])
            if made[-1].was_interrupted:
                break
    return measured


def _with_services(
    turns: Sequence[Turn], reporter: Reporter
) -> Generator[tuple[Turn, SharedService], None, None]:
    """The turns of an arm in a block, which stand side by side, have one service."""
    for _, own in groupby(turns, key=lambda turn: (turn.block, turn.arm.name)):
        of_service = list(own)
        with SharedService(of_service[0].arm, of_service[0].plan.settings, reporter) as service:
            for turn in of_service:
                yield turn, service
