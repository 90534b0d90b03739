"""Public traces of LLM traffic: when requests came, how long prompts and answers were.

Three formats are told apart by their fields: Azure (CSV), Mooncake (JSON lines), BurstGPT (CSV). The traces
hold lengths but no text, so prompts are made up in token ids drawn for each row: lengths are exact on every
model, and no two prompts begin alike.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from adapters.base import ConfigError
from harness.plan.corpus import Corpus, Prompt
from harness.plan.draws import Draws

_LOWEST_ID, _NUM_IDS = 32, 95
"""Ids of plain characters in byte-level vocabularies, and somewhere inside every larger one."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    offset_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """`num_left_out`: rows longer than allowed, or that gave no answer."""

    rows: tuple[TraceRow, ...]
    sha256: str
    num_left_out: int


def load_trace(path: Path, *, num_rows: int, time_scale: float = 1.0, max_tokens: int | None = None) -> Trace:
    """The first `num_rows` usable rows. `max_tokens` leaves out rows of more, prompt and answer together.

    Raises:
        ConfigError: the file is missing, of no known kind, or has no usable row.
    """
    if not path.is_file():
        raise ConfigError(f"there is no trace at {path}")
    content = path.read_bytes()
    rows: list[TraceRow] = []
    num_left_out = 0
    for row in _parsed(content.decode("utf-8-sig"), path):
        fits = max_tokens is None or row.num_prompt_tokens + row.num_output_tokens <= max_tokens
        if row.num_prompt_tokens < 1 or row.num_output_tokens < 1 or not fits:
            num_left_out += 1
            continue
        rows.append(row)
        if len(rows) == num_rows:
            break
    if not rows:
        raise ConfigError(f"{path} has no usable rows ({num_left_out} were too long or gave no answer)")
    rows.sort(key=lambda row: row.offset_s)
    first_s = rows[0].offset_s
    scaled = (
        TraceRow(round((r.offset_s - first_s) * time_scale, 9), r.num_prompt_tokens, r.num_output_tokens)
        for r in rows
    )
    return Trace(tuple(scaled), hashlib.sha256(content).hexdigest(), num_left_out)


def trace_corpus(trace: Trace, path: Path, seed: int) -> Corpus:
    """One made-up prompt for each row."""
    prompts = tuple(
        synthetic_prompt(f"{path.stem}-{number}", row.num_prompt_tokens, row.num_output_tokens, seed)
        for number, row in enumerate(trace.rows)
    )
    return Corpus(prompts, path, trace.sha256, trace.sha256)


def synthetic_prompt(name: str, num_prompt_tokens: int, num_output_tokens: int, seed: int) -> Prompt:
    """Token ids drawn from the name and the seed."""
    draws = Draws(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big"))
    ids = tuple(_LOWEST_ID + int(draws.uniform() * _NUM_IDS) % _NUM_IDS for _ in range(num_prompt_tokens))
    return Prompt(id=name, prompt=ids, max_tokens=num_output_tokens, category="synthetic")


def synthetic_corpus(spec: str, num_prompts: int, seed: int) -> Corpus:
    """`512x128`: prompts of 512 tokens with answers of 128.

    Raises:
        ConfigError: it is spelled otherwise.
    """
    lengths = spec.split("x")
    if len(lengths) != 2 or not all(part.isdecimal() and int(part) > 0 for part in lengths):
        raise ConfigError(
            f"CORPUS=synthetic:{spec}: write synthetic:PROMPTxOUTPUT in tokens, as synthetic:512x128"
        )
    num_prompt, num_output = map(int, lengths)
    prompts = tuple(
        synthetic_prompt(f"synthetic-{num_prompt}-{number}", num_prompt, num_output, seed)
        for number in range(num_prompts)
    )
    digest = hashlib.sha256(f"{spec}/{num_prompts}/{seed}".encode()).hexdigest()
    return Corpus(prompts, Path(f"synthetic:{spec}"), digest, digest)


def _parsed(text: str, path: Path) -> Iterable[TraceRow]:
    try:
        if text.lstrip().startswith("{"):
            return [_mooncake(json.loads(line)) for line in text.splitlines() if line.strip()]
        lines = list(csv.DictReader(io.StringIO(text)))
        names = set(lines[0]) if lines else set()
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= names:
            return [_azure(line, lines[0]) for line in lines]
        if {"Timestamp", "Request tokens", "Response tokens"} <= names:
            return [_burstgpt(line) for line in lines]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a row of the trace cannot be read: {error!r}") from error
    raise ConfigError(f"{path} is no trace of a known kind: Azure CSV, Mooncake JSON lines or BurstGPT CSV")


def _azure(line: Mapping[str, str], first: Mapping[str, str]) -> TraceRow:
    # Seven digits of a second: Python reads six, and a float of seconds since 1970 holds not even those.
    start, whole = (datetime.fromisoformat(item["TIMESTAMP"].partition(".")[0]) for item in (first, line))
    fraction = line["TIMESTAMP"].partition(".")[2].partition("+")[0]
    at_s = (whole - start).total_seconds() + (float(f"0.{fraction}") if fraction else 0.0)
    return TraceRow(at_s, int(line["ContextTokens"]), int(line["GeneratedTokens"]))


def _mooncake(line: Mapping[str, Any]) -> TraceRow:
    return TraceRow(float(line["timestamp"]) / 1e3, int(line["input_length"]), int(line["output_length"]))


def _burstgpt(line: Mapping[str, str]) -> TraceRow:
    return TraceRow(float(line["Timestamp"]), int(line["Request tokens"]), int(line["Response tokens"]))
