"""The same prompts in transformers: `generate()`, one by one and padded, and its own continuous batching.

The last is written for GPUs. On a CPU it runs without the kernels and graphs it was made for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.base import BackendConfig
from adapters.models.store import resolve_model
from adapters.torch_backend import loading
from tools.engine_drive import Work

_BLOCK_MULTIPLE = 256
_CPU_BATCH_TOKENS = 64
"""Elsewhere transformers finds out by itself what fits."""

AnswerAll = Callable[[list[Work], float], list[list[int]]]
"""Takes the work and a limit in seconds; returns the new tokens of each prompt."""


def load_reference(config: BackendConfig, dtype: str, device: str = "cpu") -> Any:
    """The model in transformers' own form, which never stops by itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = resolve_model(config).folder
    weights = loading.read_weights(
        folder, loading.read_config(folder), getattr(torch, dtype), torch.device(device)
    )
    model = weights.eval()
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def run_generate(model: Any, work: list[Work]) -> list[list[int]]:
    """Greedy answers, one prompt after the other."""
    answers = []
    for item in work:
        ids = torch.tensor([item.token_ids], device=model.device)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=item.max_tokens, do_sample=False)
        answers.append(out[0, len(item.token_ids) :].tolist())
        assert len(answers[-1]) == item.max_tokens
    return answers


@torch.inference_mode()
def run_padded_generate(model: Any, work: list[Work], batch_size: int = 16) -> list[list[int]]:
    """Greedy answers in batches as they come: prompts padded on the left to the longest of their batch, which
    runs until its longest answer is done. What a prompt gets beyond its own budget is cut off."""
    answers: list[list[int]] = []
    for first in range(0, len(work), batch_size):
        batch = work[first : first + batch_size]
        width = max(len(item.token_ids) for item in batch)
        pads = [width - len(item.token_ids) for item in batch]
        rows = [[0] * pad + list(item.token_ids) for pad, item in zip(pads, batch, strict=True)]
        ids = torch.tensor(rows, device=model.device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device)
        most = max(item.max_tokens for item in batch)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
        answers += [
            row[width : width + item.max_tokens].tolist() for row, item in zip(out, batch, strict=True)
        ]
    return answers


def run_continuous_batching(model: Any, work: list[Work], limit_s: float = math.inf) -> None:
    """As `generate_batch` does it, but with a budget of its own for each prompt; its start included.

    Raises:
        RuntimeError: it ended before its work was done, or was not done after `limit_s`.
    """
    attention = model.config._attn_implementation
    with continuous_batching(model, work) as answer_all:
        answer_all(work, limit_s)
    model.set_attn_implementation(attention)


@contextmanager
def continuous_batching(model: Any, work: list[Work], *, one_block: bool = False) -> Iterator[AnswerAll]:
    """Greedy continuous batching that was started and warmed, for work of the size of `work`.

    With `one_block`, a block of its cache holds a whole sequence, and steps of decode rows alone read the
    cache in place (`tools.gpu.paged_attention`).
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    longest = max(len(item.token_ids) + item.max_tokens for item in work)
    settings: dict[str, Any] = {"allow_block_sharing": False}
    if one_block:
        settings["block_size"] = -(-longest // _BLOCK_MULTIPLE) * _BLOCK_MULTIPLE
    if model.device.type == "cpu":
        size = settings.setdefault("block_size", _BLOCK_MULTIPLE)
        settings["num_blocks"] = (len(work) + 1) * -(-longest // size)
        settings["max_batch_tokens"] = max(_CPU_BATCH_TOKENS, len(work))
    most = max(item.max_tokens for item in work)
    generation = type(model.generation_config)(max_new_tokens=most, do_sample=False, eos_token_id=-1)
    with torch.no_grad():
        manager = model.init_continuous_batching(
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(**settings),
        )
        if one_block:
            # Left to itself it takes this fast path with the flash-attn package alone.
            manager.continuous_batching_config.max_blocks_per_request = 1
        manager.warmup()
        manager.start()
        try:
            yield lambda items, limit_s: _answer_all(manager, items, limit_s)
        finally:
            manager.stop(block=True, timeout=5)
            manager.destroy()


def _answer_all(manager: Any, work: list[Work], limit_s: float) -> list[list[int]]:
    started_s = time.monotonic()
    ids = [manager.add_request(item.token_ids, max_new_tokens=item.max_tokens) for item in work]
    answers: dict[str, list[int]] = {}
    while len(answers) < len(work):
        result = manager.get_result(timeout=1)
        if result and result.is_finished():
            if result.error:
                raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
            answers[result.request_id] = list(result.generated_tokens)
        if not result and not manager.is_running():
            raise RuntimeError("transformers' continuous batching ended before its work was done")
        if time.monotonic() - started_s > limit_s:
            raise RuntimeError(f"transformers' continuous batching was not done after {limit_s:.0f} s")
    return [answers[request_id] for request_id in ids]
