"""Random mixed load on the compiled kernels, for a process that an address sanitizer watches.

`python -m tests.adapters.torch_backend.sanitized_load FOLDER SECONDS SEED` prints one line when it is done.
A fresh backend goes on every SECONDS_A_BACKEND seconds, with other shapes, dtype, threads and limits.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from adapters.base import SamplingParams, ScheduledChunk, Sequence
from adapters.torch_backend.backend import TorchBackend
from adapters.torch_backend.cpu import kernels
from tests.adapters.configs import make_config
from tests.adapters.torch_backend.test_backend import FAMILIES, VOCAB, make_model

SECONDS_A_BACKEND = float(os.environ.get("SECONDS_A_BACKEND", "15"))
LLAMA = FAMILIES["LlamaConfig"]
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", {}),
    ("LlamaConfig", {"head_dim": 64, "num_key_value_heads": 1, "vocab_size": VOCAB + 9}),
    ("LlamaConfig", {"hidden_size": 192, "head_dim": 96, "num_attention_heads": 6, "intermediate_size": 100}),
    ("LlamaConfig", {"head_dim": 128, "num_hidden_layers": 3, "intermediate_size": 176}),
    ("MistralConfig", {}),
    ("MistralConfig", {"sliding_window": 100, "num_key_value_heads": 4}),
    ("Qwen2Config", {}),
    ("Qwen3Config", {}),
    ("GPT2Config", {}),
]


def main(folder: Path, seconds: float, seed: int) -> None:
    # One piece of memory for each weight: the sanitizer watches the ends of allocations.
    kernels._Arena.empty = lambda _, shape, dtype: torch.empty(shape, dtype=dtype)  # type: ignore[method-assign]
    rng = random.Random(seed)
    built = kernels.load_kernels(folder / "kernels", torch.float32, 1)
    assert built is not None, "the kernels could not be built"
    end_s = time.monotonic() + seconds
    made: dict[int, Path] = {}
    num_steps = num_rows = num_backends = 0
    least_backends = len(SHAPES) if seconds >= 60 else 1  # on a busy machine they alone take longer
    while time.monotonic() < end_s or num_backends < least_backends:
        number = rng.randrange(len(SHAPES)) if num_backends >= len(SHAPES) else num_backends
        family, changes = SHAPES[number]
        if number not in made:
            made[number] = make_model(folder / str(number), family, **changes)
        backend = TorchBackend(
            make_config(
                model=str(made[number]),
                dtype=rng.choice(["bf16", "bf16", "fp32"]),
                num_threads=rng.choice([1, 2]),
                max_batch_size=rng.choice([1, 3, 8, 17]),
                max_model_len=rng.choice([65, 128, 200, 512]),
                prefill_chunk=rng.choice([1, 16, 64]),
                artifacts_dir=str(folder),
            )
        )
        assert backend.info.details["cpu_kernels"] is True, "the kernels were not loaded"
        steps, rows = drive(backend, rng, time.monotonic() + min(seconds / 20, SECONDS_A_BACKEND))
        num_steps, num_rows, num_backends = num_steps + steps, num_rows + rows, num_backends + 1
        backend.close()
    print(f"{num_backends} backends, {len(made)} of {len(SHAPES)} shapes, {num_steps} steps, {num_rows} rows")


def drive(backend: TorchBackend, rng: random.Random, end_s: float) -> tuple[int, int]:
    """Sequences come, go and are given up at random; the numbers of steps and of rows."""
    limit, num_slots = backend.info.max_model_len, backend.info.max_batch_size
    running: list[Sequence] = []
    num_steps = num_rows = num_begun = 0
    while time.monotonic() < end_s:
        while len(running) < num_slots and rng.random() < 0.7:
            # Half of them end at the last place of their slot.
            num_prompt = rng.choice([1, 15, 16, 17, 63, 64, 65, rng.randrange(1, limit), limit - 1])
            num_prompt = min(num_prompt, limit - 1)
            room = limit - num_prompt
            num_new = room if rng.random() < 0.5 else rng.randrange(1, room + 1)
            ids = [rng.choice([0, VOCAB - 1, rng.randrange(VOCAB)]) for _ in range(num_prompt)]
            params = SamplingParams(max_tokens=num_new, temperature=rng.choice([0.0, 1.0]), seed=num_begun)
            running.append(Sequence(num_begun, ids, params))
            num_begun += 1
        chunks = []
        for seq in rng.sample(running, len(running)):
            if chunks and rng.random() < 0.1:
                continue
            start, rest = seq.num_computed_tokens, seq.num_tokens - seq.num_computed_tokens
            chunks.append(ScheduledChunk(seq, start, min(rest, rng.choice([1, 7, 16, 64, 512]))))
        if not chunks:
            continue
        outputs = {output.seq_id: output.token_ids for output in backend.step(chunks)}
        num_steps += 1
        for chunk in chunks:
            seq = chunk.seq
            num_rows += chunk.num_tokens
            seq.num_computed_tokens += chunk.num_tokens
            seq.output_token_ids += outputs.get(seq.seq_id, [])
            is_done = len(seq.output_token_ids) >= seq.params.max_tokens
            if is_done or rng.random() < 0.01:
                running.remove(seq)
                backend.release([seq.seq_id])
    backend.release([seq.seq_id for seq in running])
    return num_steps, num_rows


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
