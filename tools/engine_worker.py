"""One engine in a process of its own, which measures itself once for each line of its standard input.

`python -m tools.engine_worker ENGINE OPTIONS` first says what is loaded, then what each round took, a line of
JSON each. Everything goes through the `Backend` protocol, as in the service. An engine's own settings come
from the environment and `.env`, as the service's do. What an engine itself prints goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

from adapters.base import Backend, LabError, SamplingParams, ScheduledChunk, Sequence
from adapters.registry import create_backend, load_tokenizer
from harness.plan.corpus import default_path, load_corpus
from harness.settings import SETTING_NAMES
from services.read_settings import read_settings
from tools.engine_drive import Work, drive

CONTEXT = 128
"""Tokens before the first timed decode step."""
_DECODE_STEPS = 20
_PROMPT_TOKENS = 512  # one step's budget

_next_seq_id = count(1_000_000)  # above those of `drive`


def main() -> int:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, options = sys.argv[1], json.loads(sys.argv[2])
    rows, num_requests = options.pop("rows"), options.pop("requests")
    limits = {"max_batch": max(rows), "max_step_tokens": _PROMPT_TOKENS}
    try:
        settings = read_settings({"backend": name, **limits, **options}, passed_over=SETTING_NAMES)
        config = settings.engine_spec().backend
        backend, tokenizer = create_backend(config), load_tokenizer(config)
    except LabError as error:
        print(json.dumps({"error": str(error)}), file=replies)
        return 1
    print(json.dumps(dataclasses.asdict(backend.info)), file=replies)
    prompts = load_corpus(default_path()).prompts[:num_requests]
    work = [Work(tokenizer.encode(str(p.prompt)), p.max_tokens) for p in prompts]
    for _ in sys.stdin:
        measured = [*_decode(backend, rows), _prompt(backend), _answer(backend, work)]
        print(json.dumps({"measured": measured}), file=replies)
    backend.close()
    return 0


def _decode(backend: Backend, rows: list[int]) -> Iterator[dict[str, Any]]:
    """The median time of a decode step of each number of rows; the first two steps are not counted.

    All sequences that the backend holds have a row: some engines compute the others too.
    """
    sequences: list[Sequence] = []
    for num_rows in sorted(rows):
        while len(sequences) < num_rows:
            sequences.append(_sequence(CONTEXT))
            _step(backend, [ScheduledChunk(sequences[-1], 0, CONTEXT)])
        seconds = []
        for _ in range(2 + _DECODE_STEPS):
            chunks = [ScheduledChunk(seq, seq.num_tokens - 1, 1) for seq in sequences]
            seconds.append(_step(backend, chunks))
        yield _measured(f"decode step, {num_rows} rows", num_rows, statistics.median(seconds[2:]))
    backend.release([seq.seq_id for seq in sequences])


def _prompt(backend: Backend) -> dict[str, Any]:
    """The median time of three prompts, one after the other."""
    seconds = []
    for _ in range(3):
        seq = _sequence(_PROMPT_TOKENS)
        seconds.append(_step(backend, [ScheduledChunk(seq, 0, _PROMPT_TOKENS)]))
        backend.release([seq.seq_id])
    return _measured(f"prompt of {_PROMPT_TOKENS}", _PROMPT_TOKENS, statistics.median(seconds))


def _answer(backend: Backend, work: list[Work]) -> dict[str, Any]:
    """All of `work`, there from the start, by the strategy continuous."""
    started_s = time.perf_counter()
    drive(backend, "continuous", work, max_batch=min(16, backend.info.max_batch_size))
    seconds = time.perf_counter() - started_s
    return _measured(f"{len(work)} requests, continuous", sum(item.max_tokens for item in work), seconds)


def _measured(measure: str, num_tokens: int, seconds: float) -> dict[str, Any]:
    return {"measure": measure, "num_tokens": num_tokens, "seconds": seconds}


def _sequence(num_tokens: int) -> Sequence:
    """No two begin alike, so that a prefix cache gains nothing."""
    seq_id = next(_next_seq_id)
    return Sequence(seq_id, [(7 * seq_id + 13 * j) % 251 for j in range(num_tokens)], SamplingParams())


def _step(backend: Backend, chunks: list[ScheduledChunk]) -> float:
    started_s = time.perf_counter()
    outputs = backend.step(chunks)
    seconds = time.perf_counter() - started_s
    tokens = {output.seq_id: output.token_ids for output in outputs}
    for chunk in chunks:
        chunk.seq.output_token_ids += tokens[chunk.seq.seq_id]
    return seconds


if __name__ == "__main__":
    sys.exit(main())
