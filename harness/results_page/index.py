"""What is in a folder of results: one line a file, from its manifest alone, kept until the file changes.

Nothing in a file is trusted: what cannot be read is listed with its error, and a link is passed over,
wherever it leads. A file is named to the outside by a digest of its place, never by a path.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from adapters.text.unicode_text import printable
from harness.results.parquet_file import MANIFEST_KEY, READ_ERRORS, first_line
from harness.results.steps import STEPS_SUFFIX

COLUMNS = (
    "id", "file", "kind", "started_at", "level", "arms", "model", "backend", "machine", "load",
    "requests", "blocks", "commit", "problem",
)  # fmt: skip
MAX_CELL_CHARS = 500
_SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
_FILTERED = """
    select * from lines
    where contains(lower(concat_ws(' ', *columns(* exclude (id, kind, level, problem)))), lower($text))
      and $level in ('', level) and $model in ('', model)
    order by started_at desc, file
"""
Line = dict[str, str]
Identity = tuple[str, int, int, int]


class ResultIndex:
    """The files below one folder."""

    def __init__(self, folder: Path) -> None:
        self._root = folder.resolve()
        self._known: dict[Identity, tuple[Path, Line]] = {}
        self._database = duckdb.connect(config={"enable_external_access": "false"})

    def read(self) -> list[tuple[Path, Line]]:
        """What lies there now; a file that has not changed is not read again."""
        known: dict[Identity, tuple[Path, Line]] = {}
        for path in sorted(_files(self._root)):
            try:
                told = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISREG(told.st_mode):
                place = os.path.relpath(path, self._root)
                identity = (place, told.st_ino, told.st_size, told.st_mtime_ns)
                known[identity] = self._known.get(identity) or (Path(path), _line(Path(path), place))
        self._known = known  # whole, because several requests read at once
        return list(known.values())

    def search(self, text: str = "", level: str = "", model: str = "") -> list[Line]:
        """The lines that hold `text`, the newest first."""
        lines = pa.Table.from_pylist([line for _, line in self.read()], _SCHEMA)
        with self._database.cursor() as database:  # a connection of its own, which threads need
            database.register("lines", lines)
            found = database.execute(_FILTERED, {"text": text, "level": level, "model": model})
            return [dict(zip(COLUMNS, row, strict=True)) for row in found.fetchall()]


def _files(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(".parquet") and not name.endswith(STEPS_SUFFIX):
                yield os.path.join(folder, name)


def _line(path: Path, place: str) -> dict[str, str]:
    line = dict.fromkeys(COLUMNS, "")
    encoded = place.encode(errors="surrogateescape")
    line |= {"id": hashlib.sha256(encoded).hexdigest()[:16], "file": place}
    try:
        raw = (pq.read_schema(path).metadata or {}).get(MANIFEST_KEY)
        line |= _facts(from_json(raw)) if raw is not None else {"problem": "no result of this harness"}
    except (*READ_ERRORS, RecursionError, TypeError, AttributeError, IndexError) as error:
        line["problem"] = f"cannot be read: {first_line(error)}"
    return {name: printable(value)[:MAX_CELL_CHARS] for name, value in line.items()}


def _facts(told: Mapping[str, Any]) -> dict[str, str]:
    is_comparison = told.get("kind") == "comparison"
    run = told["runs"][0] if is_comparison else told
    plan, service = run["schedule"], run.get("service") or {}
    rate, users = plan.get("rate"), plan.get("concurrency")
    return {
        "kind": "comparison" if is_comparison else "run",
        "started_at": str(told["started_at"]),
        "level": str((told.get("validity") or {}).get("level", "unfinished")),
        "arms": ", ".join(map(str, told["arms"])) if is_comparison else str(run["arm"]),
        "model": str(run["model"]),
        "backend": str(service.get("backend", "a server")),
        "machine": str(run["host"].get("cpu_model") or ""),
        "load": f"{users} users" if rate is None else f"{rate} requests/s, {plan['arrivals']}",
        "requests": str(plan["num_requests"]),
        "blocks": str(told["num_blocks"] if is_comparison else len(run["planned_repeats"])),
        "commit": str((run.get("git") or {}).get("sha") or "")[:12],
    }
