"""The rows of a trace file, as they stand in it: Azure's CSV, Mooncake's JSON lines, BurstGPT's CSV.

A row that cannot be true (a time that is no number, a negative or absurd length) refuses the file and names
the line: a trace with such a row is damaged or of another kind, and a guess would change the load.
Times are whole nanoseconds: a float of seconds since 1970 holds no tenth of a microsecond.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from adapters.base import ConfigError
from harness.plan.text_file import split_lines

MAX_TOKENS = 10_000_000
"""More in one prompt or answer is taken for damage: the longest contexts sold are of one or two million."""
HASHED_TOKENS = 512
"""Tokens that one of Mooncake's hash ids stands for."""
MAX_SPAN_NS = 10 * 366 * 86_400 * 10**9

_STAMP = re.compile(
    r"(?P<whole>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](?P<fraction>\d+))?\s*"
    r"(?:Z|UTC|(?P<offset>[+-]\d\d(?::?\d\d)?))?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class FileRow:
    at_ns: int
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Each stands for the next `HASHED_TOKENS` of the prompt: who begins with the same ids begins alike."""


def parse_trace(text: str, path: Path) -> list[FileRow]:
    """All rows in the order of the file.

    Raises:
        ConfigError: the file is of no known kind, or a row of it cannot be read; the line is named.
    """
    rows: list[FileRow] = []
    row_of, entries = _kind_of(text, path)
    for number, entry in entries:
        try:
            row = row_of(entry)
            if rows and abs(row.at_ns - rows[0].at_ns) > MAX_SPAN_NS:
                raise ValueError("its time is more than ten years from the first row's")
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)[:200]
            raise ConfigError(
                f"{path}, line {number}: this row of the trace cannot be read: {what}"
            ) from error
        rows.append(row)
    return rows


_Entry = Mapping[str, Any]
_Entries = Iterator[tuple[int, _Entry]]


def _kind_of(text: str, path: Path) -> tuple[Callable[[_Entry], FileRow], _Entries]:
    if text.lstrip().startswith("{"):
        return _mooncake, _json_entries(text, path)
    reader = csv.reader(io.StringIO(text))
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:  # lines that end at CR alone, for one
        raise ConfigError(f"{path}, line 1: the trace is no CSV: {error}") from error
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(names):
        return _azure, _csv_entries(reader, names, path)
    if {"Timestamp", "Request tokens", "Response tokens"} <= set(names):
        return _burstgpt, _csv_entries(reader, names, path)
    raise ConfigError(f"{path} is no trace of a known kind: Azure CSV, Mooncake JSON lines or BurstGPT CSV")


def _csv_entries(reader: Any, names: list[str], path: Path) -> _Entries:
    try:
        for cells in reader:
            if any(cells[len(names) :]):  # a count with a comma in it, say: the rest is in wrong columns
                raise ConfigError(f"{path}, line {reader.line_num}: has more cells than the header names")
            if cells:
                yield reader.line_num, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: the trace is no CSV: {error}") from error


def _json_entries(text: str, path: Path) -> _Entries:
    for number, line in enumerate(split_lines(text), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: this row of the trace is no JSON: {error}") from error
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{path}, line {number}: this row of the trace is no JSON object")
        yield number, entry


def _azure(entry: _Entry) -> FileRow:
    stamp = entry["TIMESTAMP"]
    match = _STAMP.fullmatch(stamp.strip())
    if match is None:
        raise ValueError(f"{stamp!r} is no time stamp")
    # Whole seconds by the calendar, the fraction by hand: Python's time stamps end at microseconds.
    whole = datetime.fromisoformat(match["whole"] + (match["offset"] or "+00:00"))
    at_s = int((whole - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    fraction_ns = int((match["fraction"] or "").ljust(9, "0")[:9])
    return FileRow(
        at_s * 10**9 + fraction_ns, _tokens(entry, "ContextTokens"), _tokens(entry, "GeneratedTokens")
    )


def _mooncake(entry: _Entry) -> FileRow:
    hash_ids = entry.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(type(number) is int for number in hash_ids):
        raise ValueError(f"hash_ids is {hash_ids!r}: it must be a list of whole numbers")
    return FileRow(
        _time_ns(entry, "timestamp", 10**6),
        _tokens(entry, "input_length"),
        _tokens(entry, "output_length"),
        tuple(hash_ids),
    )


def _burstgpt(entry: _Entry) -> FileRow:
    return FileRow(
        _time_ns(entry, "Timestamp", 10**9),
        _tokens(entry, "Request tokens"),
        _tokens(entry, "Response tokens"),
    )


def _tokens(entry: _Entry, name: str) -> int:
    """A count; `374.0` is 374, as tools that read the column as floats write it."""
    number = _number(entry, name)
    if number != number.to_integral_value() or not 0 <= number <= MAX_TOKENS:
        raise ValueError(f"{name} is {entry[name]}: it must be a whole number from 0 to {MAX_TOKENS}")
    return int(number)


def _time_ns(entry: _Entry, name: str, unit_ns: int) -> int:
    number = _number(entry, name)
    if not 0 <= number <= Decimal(10**18) / unit_ns * 10:
        raise ValueError(f"{name} is {entry[name]}: it is no time that a trace can hold")
    return int(number * unit_ns)


def _number(entry: _Entry, name: str) -> Decimal:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} is {value!r}: it must be a number")
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        raise ValueError(f"{name} is {value!r}: it must be a number") from None
    if not number.is_finite():
        raise ValueError(f"{name} is {value}: it must be a number")
    return number
