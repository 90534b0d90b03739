"""What tests of llama.cpp share: a small configuration, and one greedy answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from adapters.base import Backend, BackendConfig, SamplingParams, ScheduledChunk, Sequence
from tests.adapters.configs import make_config


def config(model: str | Path, artifacts: Path, **changes: Any) -> BackendConfig:
    options = {"max_batch_size": 4, "num_threads": 1, "max_model_len": 384, **changes}
    return make_config("llama_cpp", model=str(model), artifacts_dir=str(artifacts), **options)


def answer(backend: Backend, prompt: list[int], num_tokens: int) -> list[int]:
    seq = Sequence(random.randrange(1 << 40), prompt, SamplingParams(max_tokens=num_tokens))
    while len(seq.output_token_ids) < num_tokens:
        start = seq.num_computed_tokens
        (output,) = backend.step([ScheduledChunk(seq, start, seq.num_tokens - start)])
        seq.num_computed_tokens = seq.num_tokens
        seq.output_token_ids += output.token_ids
    backend.release([seq.seq_id])
    return seq.output_token_ids
