"""The folder of the history: `date=YYYY-MM-DD/commit=SHA/ENTRY.parquet`.

Any tool that reads hive partitions reads it. A file is written once and never changed, so that adding a
result twice changes nothing and two histories merge by copying. A damaged file costs its own rows and is
named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from adapters.base import ConfigError, LabError
from harness.history.entries import SCHEMA, entries_of
from harness.results.output_dir import whole_file
from harness.results.parquet_file import READ_ERRORS, first_line

_DAY = re.compile(r"date=(\d{4}-\d{2}-\d{2})")
MOST_DAYS = 36_500
_COLUMNS = ", ".join(f'"{name}"' for name in SCHEMA.names)


@dataclass(slots=True)
class Added:
    new: list[Path] = field(default_factory=list)
    known: list[Path] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """One sentence a file."""


@dataclass(frozen=True, slots=True)
class History:
    """`rows` are those of `entries.SCHEMA`, the oldest first, or a query's answer."""

    rows: pd.DataFrame
    damaged: tuple[str, ...]


def add(folder: Path, results: Sequence[Path]) -> Added:
    """Results that are there already are passed over, damaged ones counted.

    Raises:
        LabError: the folder takes no files.
    """
    found = Added()
    for path in results:
        try:
            table = entries_of(path)
        except LabError as error:
            found.damaged.append(str(error))
            continue
        first = table.slice(0, 1).to_pylist()[0]
        day, name = folder / f"date={first['started_at']:%Y-%m-%d}", f"{first['entry_id']}.parquet"
        parts = {day / f"commit={commit}" / name: commit for commit in table["commit"].unique().to_pylist()}
        missing = [target for target in parts if not target.exists() or _problem(target)]
        for target in missing:
            with whole_file(target) as file:
                part = table.filter(pc.field("commit") == parts[target])
                pq.write_table(part, file, compression="zstd", write_page_checksum=True)
        (found.new if missing else found.known).append(path)
    return found


def read(folder: Path) -> History:
    """Everything that is whole. Runs that stand in a file of their own and in a comparison count once.

    Raises:
        LabError: there is no history here, or nothing of it can be read.
    """
    found = query(folder, f"SELECT {_COLUMNS} FROM history ORDER BY started_at, strategy, metric")
    return History(_once(found.rows), found.damaged)


def query(folder: Path, sql: str) -> History:
    """The answer of DuckDB; the table is called `history` and holds everything that is whole.

    Raises:
        LabError: there is no history here, nothing of it can be read, or the statement cannot be run.
    """
    files = sorted(folder.glob("date=*/commit=*/*.parquet"))
    if not files:
        raise LabError(f"{folder} holds no history: `lab history add RESULT... --to {folder}` begins one")
    problems = {path: problem for path in files if (problem := _problem(path))}
    whole = [str(path) for path in files if path not in problems]
    if not whole:
        raise LabError(f"{folder}: none of {len(files)} files can be read: {next(iter(problems.values()))}")
    # The folder's names repeat what the columns say.
    with duckdb.connect() as connection:
        try:
            connection.execute("SET TimeZone = 'UTC'")
            source = connection.read_parquet(whole, hive_partitioning=False)
            source.create_view("history")
            return History(connection.execute(sql).df(), tuple(problems.values()))
        except duckdb.Error as error:
            raise LabError(f"{folder}: {first_line(error)}") from error


def prune(folder: Path, *, keep_days: int, today: date | None = None) -> int:
    """Remove the files of days before the last `keep_days`; the number of them.

    Raises:
        ConfigError: `keep_days` is not from 1 to `MOST_DAYS`.
    """
    if not 1 <= keep_days <= MOST_DAYS:
        raise ConfigError(f"--keep-days must be from 1 to {MOST_DAYS}, not {keep_days}")
    oldest = (today or datetime.now(UTC).date()) - timedelta(days=keep_days - 1)
    num_removed = 0
    for day in sorted(folder.glob("date=*/")):
        if (of_folder := _day_of(day.name)) is None or of_folder >= oldest:
            continue
        for path in sorted(day.glob("commit=*/*.parquet")):
            path.unlink()
            num_removed += 1
        for empty in (*day.glob("commit=*/"), day):
            if not any(empty.iterdir()):
                empty.rmdir()
    return num_removed


def _day_of(name: str) -> date | None:
    match = _DAY.fullmatch(name)
    try:
        return date.fromisoformat(match[1]) if match else None
    except ValueError:
        return None


def _problem(path: Path) -> str:
    """One sentence on what is wrong with a file; empty where nothing is."""
    try:
        # Reading everything is what checks the checksums; a file of an entry has some KB.
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except READ_ERRORS as error:
        return f"{path} cannot be read: {first_line(error)}"
    wanted = {f.name: f.type for f in SCHEMA}
    if missing := [name for name in wanted if name not in table.column_names]:
        return f"{path} is no part of a history: it has no column {missing[0]}"
    if wrong := [name for name, kind in wanted.items() if not _fits(table.schema.field(name).type, kind)]:
        return f"{path} is no part of a history: its column {wrong[0]} has another type"
    return ""


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    return bool(found == wanted or (pa.types.is_list(found) and pa.types.is_list(wanted)))


def _once(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the result lines of runs that a larger entry holds too, and the best entry of the same runs."""
    results = rows[rows["kind"] == "result"]
    entries = results.groupby(["entry_id", "strategy"])["run_ids"].first().map(frozenset)
    held: dict[str, list[frozenset[str]]] = {}
    for ids in set(entries):
        for run_id in ids:
            held.setdefault(run_id, []).append(ids)
    smaller = {
        key for key, ids in entries.items() if any(ids < other for run_id in ids for other in held[run_id])
    }
    keys = pd.Series(list(zip(rows["entry_id"], rows["strategy"], strict=True)), index=rows.index)
    kept = rows[~((rows["kind"] == "result") & keys.isin(smaller))]
    # A comparison made of one run each has the same runs as their own files; a run that was resumed, or
    # judged again, has two entries.
    told = kept.assign(
        names=kept["run_ids"].map(lambda ids: " ".join(sorted(ids))), is_invalid=kept["validity"] == "INVALID"
    ).sort_values(["is_invalid", "num_requests"], ascending=[True, False], kind="stable")
    same_runs = told.groupby(["names", "kind", "strategy", "against"], dropna=False)
    best = same_runs["entry_id"].transform("first")
    return kept[best.reindex(kept.index) == kept["entry_id"]].reset_index(drop=True)
