"""The growing result of one arm: journal, rows and manifest, until it is one judged file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from adapters.base import LabError
from harness.client.answer import Answer
from harness.client.server import Server
from harness.plan.corpus import REPOSITORY, Corpus
from harness.plan.schedule import Schedule
from harness.replay.checkout import Checkout
from harness.replay.provenance import make_manifest, new_run_id
from harness.results.facts import ForeignFacts
from harness.results.manifest import RepeatEntry, RunManifest, Validity
from harness.results.output_dir import utc_stamp
from harness.results.record import (
    JOURNAL_SUFFIX,
    Journal,
    ReplayLabels,
    Row,
    make_row,
    make_table,
    to_frame,
    write_parquet,
)
from harness.results.steps import STEPS_SUFFIX, write_steps
from harness.results.validity import judge
from harness.settings import HarnessSettings


@dataclass(frozen=True, slots=True)
class Arm:
    """One thing to measure: a strategy with settings of its own. `name` None takes the variant's name, with
    SCHEDULING=engine where no strategy of the lab decided."""

    variant: str | None
    name: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the service, by their names in `.env.example`."""
    source: Checkout | None = None
    """The commit whose code serves; None for this tree."""


@dataclass(frozen=True, slots=True)
class Measurement:
    path: Path
    rows: pd.DataFrame
    manifest: RunManifest
    validity: Validity
    stopped_after: bool = False
    """Told to stop when all of it was measured."""

    @property
    def was_cut(self) -> bool:
        """Told to stop in the middle."""
        return any(entry.was_interrupted for entry in self.manifest.repeats)

    @property
    def was_interrupted(self) -> bool:
        return self.stopped_after or self.was_cut


class ArmFile:
    """The growing result of one arm."""

    def __init__(
        self,
        arm: Arm,
        server: Server,
        settings: HarnessSettings,
        corpus: Corpus,
        schedule: Schedule,
        repeats: Sequence[int],
    ) -> None:
        stamp = utc_stamp()
        self.run_id = new_run_id(stamp)
        self._variant = _variant_name(arm, server, settings)
        self._arm = arm.name or _name_of(self._variant, server)
        self._backend, self._model = server.backend, server.model
        self.manifest = make_manifest(
            run_id=self.run_id,
            variant=self._variant,
            arm=self._arm,
            source=arm.source.folder if arm.source else REPOSITORY,
            settings=settings,
            corpus=corpus,
            schedule=schedule,
            card=server.card,
            served_model=server.model,
            is_local=server.is_local,
            planned_repeats=repeats,
            foreign=_describe_foreign(server),
        )
        self._rows: list[Row] = []
        self._steps: list[dict[str, Any]] = []
        self.path, self._journal = _new_journal(settings.out / self._variant, stamp, self.manifest)

    @property
    def is_complete(self) -> bool:
        """Whether all repeats have ended, none of them cut short."""
        repeats = self.manifest.repeats
        return len(repeats) == len(self.manifest.planned_repeats) and not any(
            entry.was_interrupted for entry in repeats
        )

    def label(self, repeat: int) -> str:
        planned = self.manifest.planned_repeats
        return f"{self._arm}, repeat {repeat}" if len(planned) > 1 else self._arm

    def add(self, repeat: int, answer: Answer) -> None:
        """Keep a finished request.

        Raises:
            LabError: the disk is full. The row is in memory, for `keep` to try again.
        """
        labels = ReplayLabels(self.run_id, self._variant, self._arm, self._backend, self._model, repeat)
        row = make_row(labels, answer)
        self._rows.append(row)
        self._journal.append(row)

    def end_repeat(self, entry: RepeatEntry, steps: list[dict[str, Any]]) -> None:
        self.manifest.repeats.append(entry)
        self._steps.extend(steps)
        self._journal.append_repeat(entry)

    def keep(self) -> str:
        """End a run that was cut short: its rows are kept as INVALID, a file without rows is not.

        Returns:
            A clause on what is kept, and where.
        """
        if not self._rows:
            self._journal.remove()
            return "nothing was measured"
        try:
            path = self.finish().path
        except LabError as error:
            return str(error)
        return f"all {len(self._rows)} rows are kept in {path}"

    def finish(self) -> Measurement:
        """Write the file that the journal stands for until then.

        Raises:
            LabError: the disk does not take it; the message says what is kept.
        """
        table = make_table(self._rows)
        rows = to_frame(table)
        if self.manifest.foreign is not None:
            counts = rows["chunk_tokens"][rows["error"].isna()]
            self.manifest.foreign.token_ids = bool(counts.notna().all() and any(map(len, counts)))
            gauges = [entry.server for entry in self.manifest.repeats if entry.server]
            self.manifest.foreign.queue_time = any(told.queue_s is not None for told in gauges)
        validity = self.manifest.validity = judge(rows, self.manifest)
        try:
            write_parquet(self.path, table, self.manifest)
        except LabError as error:
            raise LabError(f"{error}; {self._kept_in_journal()}") from error
        self._journal.remove()
        if self._steps:
            try:
                write_steps(self.path.with_suffix(STEPS_SUFFIX), self._steps, self.manifest)
            except LabError as error:
                raise LabError(f"{error}; all {len(rows)} rows are kept in {self.path}") from error
        return Measurement(self.path, rows, self.manifest, validity)

    def _kept_in_journal(self) -> str:
        with contextlib.suppress(LabError):
            self._journal.flush()
        self._journal.close()
        kept = f"{self._journal.num_rows} of {len(self._rows)} rows are kept in {self._journal.path}"
        return f"{kept}: make room, then `lab report --recover` it"


def _describe_foreign(server: Server) -> ForeignFacts | None:
    if server.card is not None:
        return None
    found = server.kind
    return ForeignFacts(kind=found.kind.name, version=found.version) if found else ForeignFacts(kind=None)


def _variant_name(arm: Arm, server: Server, settings: HarnessSettings) -> str:
    """The canonical name, as a service of ours gives it; a foreign server is what the label says."""
    if settings.url and arm.variant is None:
        return "external"
    return server.card.variant if server.card else arm.variant or "external"


def _name_of(variant: str, server: Server) -> str:
    """So that rows of the two kinds are of one arm nowhere, in joined files and the history neither."""
    by_engine = server.card is not None and server.card.scheduling == "engine"
    return f"{variant} SCHEDULING=engine" if by_engine else variant


def _new_journal(folder: Path, stamp: str, manifest: RunManifest) -> tuple[Path, Journal]:
    """A journal, and the parquet path it will become; a second run within the same second gets a number."""
    number = 1
    while True:
        stem = stamp if number == 1 else f"{stamp}-{number}"
        path = folder / f"{stem}.parquet"
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                return path, Journal(folder / f"{stem}{JOURNAL_SUFFIX}", manifest)
        number += 1
