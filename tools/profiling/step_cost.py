"""`lab step-cost`: what driving llama.cpp through the adapter adds to a bare loop over `llama_decode`.

Both run in one context on the same sequences at the same positions, in blocks that alternate. The adapter's
`step` does its slots, chunks and outputs; the bare loop only writes tokens and positions, decodes and takes
the argmax.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass

import llama_cpp.llama_cpp as C
from rich.console import Console
from rich.table import Table

from adapters.base import BackendConfig, SamplingParams, ScheduledChunk, Sequence
from adapters.llama_cpp_backend.backend import LlamaCppBackend
from adapters.llama_cpp_backend.batch import StepBatch

_MIN_SHARE = 0.05
_MIN_COST_US = 50.0


@dataclass(frozen=True, slots=True)
class StepCost:
    """Medians over all steps of all blocks, in microseconds."""

    num_rows: int
    adapter_us: float
    bare_us: float

    @property
    def cost_us(self) -> float:
        return self.adapter_us - self.bare_us

    @property
    def is_within_bound(self) -> bool:
        return self.cost_us <= max(_MIN_COST_US, _MIN_SHARE * self.bare_us)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=[os.environ.get("MODEL", "lab-26m")], metavar="MODEL")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each block (default 30)")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of each kind (default 6)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--artifacts-dir", default=os.environ.get("ARTIFACTS_DIR", "artifacts"))


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    table = Table("model", "rows", "bare us", "adapter us", "cost us", "share", "within 5% or 50 us")
    for model in args.models:
        for num_rows in args.rows:
            cost = measure(
                BackendConfig(
                    backend="llama_cpp",
                    model=model,
                    num_threads=args.threads,
                    max_batch_size=num_rows,
                    artifacts_dir=args.artifacts_dir,
                ),
                args.prompt,
                args.steps,
                args.blocks,
            )
            table.add_row(
                model,
                str(num_rows),
                f"{cost.bare_us:,.0f}",
                f"{cost.adapter_us:,.0f}",
                f"{cost.cost_us:+,.0f}",
                f"{cost.cost_us / cost.bare_us:+.1%}",
                "yes" if cost.is_within_bound else "NO",
            )
    Console(soft_wrap=True).print(table)
    return 0


def measure(config: BackendConfig, num_prompt_tokens: int, num_steps: int, num_blocks: int) -> StepCost:
    """Alternate blocks; each starts where the prompts end, so both see the same lengths."""
    backend = LlamaCppBackend(config)
    num_rows, params = config.max_batch_size, SamplingParams(max_tokens=num_steps)
    vocab_size = backend.info.vocab_size
    prompts = [[(7 * row + 31 * i) % vocab_size for i in range(num_prompt_tokens)] for row in range(num_rows)]
    adapter_s: list[float] = []
    bare_s: list[float] = []
    for block in range(num_blocks):
        sequences = [Sequence(row, prompt, params) for row, prompt in enumerate(prompts)]
        for seq in sequences:
            _advance(backend, [seq])
        first_tokens = [seq.output_token_ids[0] for seq in sequences]
        if block % 2:
            bare_s += _bare_steps(backend, first_tokens, num_prompt_tokens, num_steps)
            adapter_s += [_advance(backend, sequences) for _ in range(num_steps)]
        else:
            adapter_s += [_advance(backend, sequences) for _ in range(num_steps)]
            _rewind(backend, num_rows, num_prompt_tokens)
            bare_s += _bare_steps(backend, first_tokens, num_prompt_tokens, num_steps)
        backend.release([seq.seq_id for seq in sequences])
    backend.close()
    return StepCost(num_rows, 1e6 * statistics.median(adapter_s), 1e6 * statistics.median(bare_s))


def _advance(backend: LlamaCppBackend, sequences: list[Sequence]) -> float:
    """One step, booked as the scheduler books it. Returns the seconds inside `step` alone."""
    chunks = [
        ScheduledChunk(seq, seq.num_computed_tokens, seq.num_tokens - seq.num_computed_tokens)
        for seq in sequences
    ]
    started_s = time.perf_counter()
    outputs = backend.step(chunks)
    took_s = time.perf_counter() - started_s
    for seq, output in zip(sequences, outputs, strict=True):
        seq.num_computed_tokens = seq.num_tokens
        seq.output_token_ids += output.token_ids
    return took_s


def _bare_steps(
    backend: LlamaCppBackend, tokens: list[int], num_prompt_tokens: int, num_steps: int
) -> list[float]:
    """The floor: nothing but writing the batch, `llama_decode` and the argmax. Leaves the cache as it was."""
    num_rows = len(tokens)
    batch = StepBatch(num_rows)
    seconds = []
    slots = wanted = list(range(num_rows))
    for step in range(num_steps):
        positions = [num_prompt_tokens + step] * num_rows
        started_s = time.perf_counter()
        status = C.llama_decode(backend.context, batch.fill(tokens, positions, slots, wanted))
        tokens = backend.logits(num_rows).argmax(-1).tolist()
        seconds.append(time.perf_counter() - started_s)
        assert status == 0, "the prompts left room"
    _rewind(backend, num_rows, num_prompt_tokens)
    return seconds


def _rewind(backend: LlamaCppBackend, num_rows: int, position: int) -> None:
    for slot in range(num_rows):
        C.llama_memory_seq_rm(C.llama_get_memory(backend.context), slot, position, -1)
