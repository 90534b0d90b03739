"""What transformers itself makes of the same prompts: `generate()` one by one, and its continuous batching.

The continuous batching returns no tokens: what counts is the time that it takes.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from adapters.base import BackendConfig
from adapters.models.store import resolve_model
from tools.engine_drive import Work


def load_reference(config: BackendConfig, dtype: str, device: str = "cpu") -> Any:
    """The model in transformers' own form, which never stops by itself."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(resolve_model(config).folder, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
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


@torch.no_grad()
def run_continuous_batching(model: Any, work: list[Work], limit_s: float = math.inf) -> None:
    """As `generate_batch` does it, but with a budget of its own for each prompt.

    Raises:
        RuntimeError: it ended before its work was done, or was not done after `limit_s`.
    """
    started_s = time.monotonic()
    attention = model.config._attn_implementation
    longest = max(item.max_tokens for item in work)
    config = type(model.generation_config)(max_new_tokens=longest, do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(generation_config=config, timeout=5) as manager:
        for item in work:
            manager.add_request(item.token_ids, max_new_tokens=item.max_tokens)
        num_left = len(work)
        while num_left:
            result = manager.get_result(timeout=1)
            num_left -= bool(result and result.is_finished())
            if not result and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before its work was done")
            if time.monotonic() - started_s > limit_s:
                raise RuntimeError(f"transformers' continuous batching was not done after {limit_s:.0f} s")
    model.set_attn_implementation(attention)
