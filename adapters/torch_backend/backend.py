"""The torch backend: one forward pass over prompt chunks and decode rows of many sequences.

It is the reference that token identity is stated for: what a sequence gets has the same bits whatever else
is in the batch. On CUDA `cuda.backend` serves instead: its steps overlap with their planning.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from adapters.base import BackendConfig, BackendError, ScheduledChunk, StepOutput
from adapters.sampling import step_outputs
from adapters.torch_backend.model.attention import joined_rows
from adapters.torch_backend.model.kernel_llama import KernelLlama
from adapters.torch_backend.packing import RowPlan
from adapters.torch_backend.sampling import choose_tokens, find_likeliest, numbers_of
from adapters.torch_backend.startup import PlainSetup, make_ready


class TorchBackend:
    """A `Backend` for every causal LM that uses transformers' attention interface, on any device."""

    def __init__(self, config: BackendConfig) -> None:
        """Raises: as `make_ready`."""
        setup = PlainSetup(config)
        loaded, info = make_ready(config, setup)
        self.info = replace(info, has_logprobs=True)
        self.module = loaded.module
        self._forward = loaded.forward
        self._packer = setup.packer
        self.on_logits: Callable[[Tensor], object] | None = None
        """For tools that compare: gets each step's logits `(n, vocabulary)`, the sampled rows first."""

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        plan = self._packer.plan(chunks)
        try:
            if isinstance(self.module, KernelLlama):
                logits, likeliest = self._run_kernels(self.module, plan)
            else:
                logits, likeliest = self._run_torch(plan)
            if self.on_logits is not None:
                self.on_logits(logits)
            tokens = choose_tokens(logits, plan.sampled, likeliest)
            outputs = step_outputs(plan.sampled, tokens, lambda row: numbers_of(logits[row]))
        except torch.OutOfMemoryError as error:
            raise BackendError(f"out of memory in a step of {len(chunks)} rows: lower MAX_BATCH") from error
        except RuntimeError as error:
            raise BackendError(f"the forward pass failed: {error}") from error
        return outputs

    def _run_kernels(self, model: KernelLlama, plan: RowPlan) -> tuple[Tensor, list[int]]:
        rows = plan.ids, plan.slots, plan.positions
        prompts = joined_rows(plan.blocks)
        return model.run(self._packer.cache, *rows, plan.num_decodes, prompts, plan.logit_rows)

    @torch.inference_mode()
    def _run_torch(self, plan: RowPlan) -> tuple[Tensor, list[int]]:
        batch = self._packer.packed(plan)
        logits = self._forward(batch.input_ids, batch.layout, batch.logit_rows)
        return logits, find_likeliest(logits[: len(plan.sampled)], self._packer.kernels)

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self._packer.slots.release(seq_id)

    def close(self) -> None:
        del self._forward, self._packer, self.module
        gc.collect()
