"""One engine in a process of its own, which measures what it is told: a line of JSON for each order.

`python -m tools.engine_worker ENGINE OPTIONS` reads orders from standard input: `decode ROWS STEPS`, `prompt
TOKENS` and `answer REQUESTS`. Everything goes through the `Backend` protocol, as in the service. What an
engine itself prints goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import count

from adapters.base import Backend, BackendConfig, LabError, SamplingParams, ScheduledChunk, Sequence
from adapters.registry import create_backend, load_tokenizer
from harness.plan.corpus import default_path, load_corpus
from tools.engine_drive import Work, drive

CONTEXT = 128
"""Tokens before the first timed decode step."""
_PROMPT_CHUNK = 512

_next_seq_id = count(1_000_000)  # above those of `drive`


def main() -> int:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, options = sys.argv[1], json.loads(sys.argv[2])
    try:
        config = BackendConfig(backend=name, max_step_tokens=_PROMPT_CHUNK, **options)
        backend, tokenizer = create_backend(config), load_tokenizer(config)
    except LabError as error:
        print(json.dumps({"error": str(error)}), file=replies)
        return 1
    print(json.dumps(dataclasses.asdict(backend.info)), file=replies)
    prompts = [p for p in load_corpus(default_path()).prompts if isinstance(p.prompt, str)]
    work = [Work(tokenizer.encode(str(p.prompt)), p.max_tokens) for p in prompts]
    measures: dict[str, Callable[..., float]] = {
        "decode": lambda num_rows, num_steps: _decode(backend, num_rows, num_steps),
        "prompt": lambda num_tokens: _prompt(backend, num_tokens),
        "answer": lambda num_requests: _answer(backend, work[:num_requests]),
    }
    for line in sys.stdin:
        order, *numbers = line.split()
        print(json.dumps({"seconds": measures[order](*map(int, numbers))}), file=replies)
    backend.close()
    return 0


def _decode(backend: Backend, num_rows: int, num_steps: int) -> float:
    """The median time of a decode step; the first two are not counted."""
    sequences = [_sequence(CONTEXT) for _ in range(num_rows)]
    for seq in sequences:
        _step(backend, [ScheduledChunk(seq, 0, CONTEXT)])
    seconds = []
    for index in range(num_steps + 2):
        chunks = [ScheduledChunk(seq, CONTEXT + index, 1) for seq in sequences]
        seconds.append(_step(backend, chunks))
    backend.release([seq.seq_id for seq in sequences])
    return statistics.median(seconds[2:])


def _prompt(backend: Backend, num_tokens: int) -> float:
    """The time from a prompt of `num_tokens` to its first token, in chunks of one step's budget."""
    seq = _sequence(num_tokens)
    seconds = 0.0
    for start in range(0, num_tokens, _PROMPT_CHUNK):
        seconds += _step(backend, [ScheduledChunk(seq, start, min(_PROMPT_CHUNK, num_tokens - start))])
    backend.release([seq.seq_id])
    return seconds


def _answer(backend: Backend, work: list[Work]) -> float:
    """The time to answer all of `work`, there from the start, by the strategy continuous."""
    started_s = time.perf_counter()
    drive(backend, "continuous", work, max_batch=min(16, backend.info.max_batch_size))
    return time.perf_counter() - started_s


def _sequence(num_tokens: int) -> Sequence:
    """No two have the same prompt, so that a prefix cache gains nothing."""
    seq_id = next(_next_seq_id)
    return Sequence(seq_id, [(7 * seq_id + 13 * j) % 251 for j in range(num_tokens)], SamplingParams())


def _step(backend: Backend, chunks: list[ScheduledChunk]) -> float:
    started_s = time.perf_counter()
    outputs = backend.step(chunks)
    seconds = time.perf_counter() - started_s
    tokens = {output.seq_id: output.token_ids for output in outputs}
    for chunk in chunks:
        chunk.seq.output_token_ids += tokens.get(chunk.seq.seq_id, [])
    return seconds


if __name__ == "__main__":
    sys.exit(main())
