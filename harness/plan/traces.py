"""Public traces of LLM traffic: when requests came, how long prompts and answers were.

Rows are sorted by time before the first REQUESTS of them are taken, since files from the field are not
always in order. A row that cannot be replayed is left out and counted: with it goes a part of the load, and
whoever reads the figures has to know. Prompts are made up in tokens and depend on what the trace says, not
on how its file is called or encoded. Where a trace tells which prompts begin alike (`hash_ids`), so do those
that are made up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from adapters.base import ConfigError
from harness.plan.corpus import Corpus
from harness.plan.synthetic import synthetic_ids, synthetic_prompt
from harness.plan.text_file import decode
from harness.plan.trace_formats import HASHED_TOKENS, FileRow, parse_trace


@dataclass(frozen=True, slots=True)
class TraceRow:
    """`number`: its index in the file once sorted by time."""

    offset_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    number: int = 0
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """The rows to replay. The counts are of the rows left out before the last one that was taken."""

    rows: tuple[TraceRow, ...]
    sha256: str
    """Of the file's bytes."""
    content_digest: str
    """Of all its rows as they were read."""
    num_too_long: int = 0
    num_without_tokens: int = 0

    @property
    def num_left_out(self) -> int:
        return self.num_too_long + self.num_without_tokens

    def left_out(self, max_tokens: int | None) -> str | None:
        """One sentence on what is missing, or None where nothing is."""
        if not self.num_left_out:
            return None
        reasons = []
        if self.num_too_long:
            reasons.append(f"{self.num_too_long} above TRACE_MAX_TOKENS={max_tokens}")
        if self.num_without_tokens:
            reasons.append(f"{self.num_without_tokens} without prompt or answer")
        of_all = len(self.rows) + self.num_left_out
        return (
            f"{self.num_left_out} of {of_all} rows of the trace ({self.num_left_out / of_all:.0%}) were left "
            f"out: {', '.join(reasons)}"
        )


def load_trace(path: Path, *, num_rows: int, time_scale: float = 1.0, max_tokens: int | None = None) -> Trace:
    """The first `num_rows` usable rows by time; `max_tokens` bounds prompt and answer together.

    Raises:
        ConfigError: the file is missing, of no known kind, has a row that cannot be read, or no usable row.
    """
    if not path.is_file():
        raise ConfigError(f"there is no trace at {path}")
    content = path.read_bytes()
    parsed = sorted(parse_trace(decode(content, path), path), key=lambda row: row.at_ns)
    taken: list[tuple[int, FileRow]] = []
    num_too_long = num_without_tokens = 0
    for number, row in enumerate(parsed):
        if len(taken) == num_rows:
            break
        if not row.num_prompt_tokens or not row.num_output_tokens:
            num_without_tokens += 1
        elif max_tokens is not None and row.num_prompt_tokens + row.num_output_tokens > max_tokens:
            num_too_long += 1
        else:
            taken.append((number, row))
    if not taken:
        raise ConfigError(
            f"{path} has no usable rows ({num_too_long} were too long, "
            f"{num_without_tokens} had no prompt or no answer)"
        )
    first_ns = taken[0][1].at_ns
    rows = tuple(
        TraceRow(
            round((row.at_ns - first_ns) / 1e9 * time_scale, 9),
            row.num_prompt_tokens,
            row.num_output_tokens,
            number,
            row.hash_ids,
        )
        for number, row in taken
    )
    return Trace(rows, hashlib.sha256(content).hexdigest(), _digest(parsed), num_too_long, num_without_tokens)


def trace_corpus(trace: Trace, path: Path, seed: int, *, max_tokens: int | None = None) -> Corpus:
    """One made-up prompt for each row, named after the trace's content and the row's index in it.

    Equal hash ids give equal tokens; what they do not cover is the row's own.
    """
    name = f"trace-{trace.content_digest[:12]}"

    @cache
    def hashed_ids(hash_id: int) -> tuple[int, ...]:
        return synthetic_ids(f"{name}-hash-{hash_id}", HASHED_TOKENS, seed)

    prompts = []
    for row in trace.rows:
        shared = tuple(chain.from_iterable(map(hashed_ids, row.hash_ids)))[: row.num_prompt_tokens]
        num_own = row.num_prompt_tokens - len(shared)
        prompts.append(synthetic_prompt(f"{name}-{row.number}", num_own, row.num_output_tokens, seed, shared))
    return Corpus(tuple(prompts), path, trace.sha256, trace.sha256, trace.left_out(max_tokens))


def _digest(rows: list[FileRow]) -> str:
    """Times count from the first row, so that a trace written in another time zone is the same."""
    first_ns = rows[0].at_ns if rows else 0
    digest = hashlib.sha256()
    for row in rows:
        ids = "".join(f",{number}" for number in row.hash_ids)
        line = f"{row.at_ns - first_ns},{row.num_prompt_tokens},{row.num_output_tokens}{ids}\n"
        digest.update(line.encode())
    return digest.hexdigest()
