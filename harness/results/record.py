"""Rows on disk: a journal while the run goes on, parquet with the manifest in its metadata when it ends.

A killed harness loses no finished row: each is in the JSON-lines journal before the next is measured, and
`lab report --recover FILE` turns a journal into the parquet file that it would have become.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel
from pydantic_core import from_json

from adapters.base import LabError
from harness.client.answer import Answer
from harness.results.formulas import RequestMetrics, request_metrics
from harness.results.manifest import Manifest, RepeatEntry, RunManifest, parse_facts, read_manifest
from harness.results.table_file import write_table
from services.contract.timings import SequenceTimings

MANIFEST_KEY = b"lab.manifest"
JOURNAL_SUFFIX = ".journal.jsonl"


def arrow_columns(contract: type) -> list[tuple[str, pa.DataType]]:
    """The fields of a dataclass of `services.contract.timings` as columns."""
    kinds = {int: pa.int32(), float: pa.float64(), float | None: pa.float64()}
    return [(name, kinds[hint]) for name, hint in get_type_hints(contract).items()]


TIMING_COLUMNS = arrow_columns(SequenceTimings)

SCHEMA = pa.schema(
    [
        # which replay
        ("run_id", pa.string()),
        ("variant", pa.string()),
        ("arm", pa.string()),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("repeat", pa.int32()),
        # what was planned
        ("request_id", pa.string()),
        ("prompt_id", pa.string()),
        ("schedule_index", pa.int32()),
        ("offset_s", pa.float64()),
        ("max_tokens", pa.int32()),
        ("seed", pa.int64()),
        # what happened
        ("group_id", pa.int32()),
        ("group_size", pa.int32()),
        ("body_sha256", pa.string()),
        ("scheduled_s", pa.float64()),
        ("sent_s", pa.float64()),
        ("written_s", pa.float64()),
        ("chunk_s", pa.list_(pa.float64())),
        ("chunk_tokens", pa.list_(pa.int32())),
        ("finish_s", pa.float64()),
        # what follows from it
        ("ttft_ms", pa.float64()),
        ("ttft_sched_ms", pa.float64()),
        ("tokens_per_sec", pa.float64()),
        ("tpot_ms", pa.float64()),
        ("total_ms", pa.float64()),
        ("total_sched_ms", pa.float64()),
        # what the server said
        ("num_prompt_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),
        ("num_cached_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        ("output_sha256", pa.string()),
        ("text_sha256", pa.string()),
        ("output_token_ids", pa.list_(pa.int32())),
        ("server_request_id", pa.string()),
        *TIMING_COLUMNS,
    ]
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReplayLabels:
    """What the rows of one replay have in common."""

    run_id: str
    variant: str
    arm: str
    backend: str
    model: str
    repeat: int


def make_row(labels: ReplayLabels, answer: Answer) -> Row:
    """One row of `SCHEMA` from a completed answer. A failed one keeps its stamps and has no metrics."""
    planned = answer.planned
    metrics = RequestMetrics()
    chunk_tokens = answer.chunk_tokens if answer.has_token_ids else None
    if answer.error is None and answer.sent_s is not None and answer.num_output_tokens is not None:
        metrics = request_metrics(
            scheduled_s=answer.scheduled_s,
            sent_s=answer.sent_s,
            chunk_s=answer.chunk_s,
            chunk_tokens=chunk_tokens,
            num_output_tokens=answer.num_output_tokens,
        )
    return {
        **asdict(labels),
        **asdict(metrics),
        **{name: answer.timings.get(name) for name, _ in TIMING_COLUMNS},
        "request_id": f"{labels.run_id}-{labels.repeat}-{planned.index:05d}",
        "prompt_id": planned.prompt_id,
        "schedule_index": planned.index,
        "offset_s": planned.offset_s,
        "max_tokens": planned.max_tokens,
        "seed": planned.seed,
        "group_id": answer.group_id,
        "group_size": answer.group_size,
        "body_sha256": answer.body_sha256,
        "scheduled_s": answer.scheduled_s,
        "sent_s": answer.sent_s,
        "written_s": answer.written_s,
        "chunk_s": answer.chunk_s,
        "chunk_tokens": chunk_tokens,
        "finish_s": answer.finish_s,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_output_tokens": answer.num_output_tokens,
        "num_cached_tokens": answer.num_cached_tokens,
        "finish_reason": answer.finish_reason,
        "error": answer.error,
        "output_sha256": answer.output_sha256,
        "text_sha256": answer.text_sha256,
        "output_token_ids": answer.token_ids if answer.has_token_ids else None,
        "server_request_id": answer.server_request_id,
    }


class Journal:
    """Rows as JSON lines, each handed to the operating system before `append` returns."""

    def __init__(self, path: Path, manifest: RunManifest) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a killed process loses nothing that was appended.
        self._file = path.open("xb", buffering=0)
        self._write(b"manifest", manifest.to_json())

    def append(self, row: Row) -> None:
        self._write(b"row", json.dumps(row, separators=(",", ":")).encode())

    def append_repeat(self, entry: RepeatEntry) -> None:
        self._write(b"repeat", entry.to_json())

    def close(self) -> None:
        self._file.close()

    def _write(self, kind: bytes, content: bytes) -> None:
        self._file.write(b'{"%b":%b}\n' % (kind, content))


class _Line(BaseModel):
    """One line of a journal: one of the three."""

    manifest: RunManifest | None = None
    repeat: RepeatEntry | None = None
    row: Row | None = None


def read_journal(path: Path) -> tuple[RunManifest, pa.Table]:
    """Read what a journal holds; a last line that was cut off is dropped.

    Raises:
        LabError: there is no such file, or it was not written by this harness.
    """
    _check_there(path)
    manifest: RunManifest | None = None
    rows: list[Row] = []
    try:
        with path.open("rb") as file:
            for text in file:
                try:
                    entry = from_json(text)
                except ValueError:
                    break
                line = parse_facts(_Line, entry)
                manifest = line.manifest or manifest
                if line.repeat is not None and manifest is not None:
                    manifest.repeats.append(line.repeat)
                if line.row is not None:
                    rows.append(line.row)
        if manifest is None:
            raise LabError("it does not begin with a manifest")
        return manifest, make_table(rows)
    except (LabError, pa.ArrowException) as error:
        raise LabError(f"{path} is not a journal of this harness: {error}") from error


def make_table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Counts that may be missing stay integers."""
    nullable = {pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}
    frame: pd.DataFrame = table.to_pandas(types_mapper=nullable.get)
    return frame


def write_parquet(path: Path, table: pa.Table, manifest: Manifest) -> None:
    write_table(path, table, MANIFEST_KEY, manifest.to_json())


def read_parquet(path: Path) -> tuple[Manifest, pd.DataFrame]:
    """Read a file of this harness back.

    Raises:
        LabError: there is no such file, it is not parquet, or carries no manifest that can be read.
    """
    _check_there(path)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise LabError(f"{path} cannot be read as parquet: {error}") from error
    metadata: dict[bytes, bytes] = table.schema.metadata or {}
    raw = metadata.get(MANIFEST_KEY)
    if raw is None:
        own = next((name.decode() for name in metadata if name.split(b".")[0] == b"lab"), None)
        if own is not None:
            raise LabError(
                f"{path} holds figures of the lab, but neither a run nor a comparison: read its rows with "
                f"pandas.read_parquet, and how they came about in the parquet metadata `{own}`"
            )
        raise LabError(f"{path} carries no manifest: it was not written by this harness")
    try:
        return read_manifest(raw), to_frame(table)
    except LabError as error:
        raise LabError(f"{path}: {error}") from error


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise LabError(f"there is no file {path}")
