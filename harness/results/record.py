"""Rows on disk: a journal while the run goes on, parquet when it ends.

What enters are completed answers; what leaves is one parquet file with the manifest in its metadata.
Each row is appended to a JSON-lines journal as it finishes, so that a killed harness loses none: the
journal turns into parquet with `lab report --recover FILE`. Knows the columns, no percentiles.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from adapters.base import LabError
from harness.client.answer import Answer
from harness.results.metrics import RequestMetrics, request_metrics
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
Manifest = dict[str, Any]


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

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a killed process loses nothing that was appended.
        self._file = path.open("xb", buffering=0)
        self._write({"manifest": manifest})

    def append(self, row: Row) -> None:
        self._write({"row": row})

    def append_repeat(self, entry: dict[str, Any]) -> None:
        """The facts of a replay that has ended, as they belong into the manifest's `repeats`."""
        self._write({"repeat": entry})

    def close(self) -> None:
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")


def read_journal(path: Path) -> tuple[Manifest, list[Row]]:
    """Read what a journal holds; a last line that was cut off is dropped.

    Raises:
        LabError: there is no such file, or it does not begin with a manifest.
    """
    _check_there(path)
    manifest: Manifest | None = None
    rows: list[Row] = []
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if "manifest" in entry:
                manifest = entry["manifest"]
            elif manifest is not None and "repeat" in entry:
                manifest["repeats"].append(entry["repeat"])
            elif "row" in entry:
                rows.append(entry["row"])
    if manifest is None:
        raise LabError(f"{path} is not a journal of this harness: it does not begin with a manifest")
    return manifest, rows


def to_frame(rows: list[Row]) -> pd.DataFrame:
    """The rows as pandas sees them after a round through parquet."""
    return _frame(pa.Table.from_pylist(rows, schema=SCHEMA))


def write_parquet(path: Path, rows: list[Row], manifest: Manifest) -> None:
    """Write all rows at once; the file appears under its name only when it is whole."""
    write_table(path, pa.Table.from_pylist(rows, schema=SCHEMA), manifest)


def write_table(path: Path, table: pa.Table, manifest: Manifest) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**(table.schema.metadata or {}), MANIFEST_KEY: json.dumps(manifest).encode()}
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd")
    os.replace(partial, path)


def read_parquet(path: Path) -> tuple[Manifest, pd.DataFrame]:
    """Read a file of this harness back.

    Raises:
        LabError: there is no such file, it is not parquet, or carries no manifest.
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
    manifest: Manifest = json.loads(raw)
    return manifest, _frame(table)


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise LabError(f"there is no file {path}")


def _frame(table: pa.Table) -> pd.DataFrame:
    nullable = {pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}
    frame: pd.DataFrame = table.to_pandas(types_mapper=nullable.get)
    return frame
