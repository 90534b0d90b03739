"""The torch backend: one forward pass over prompt chunks and decode rows of many sequences.

Before it serves, the backend compares its forward pass with the model's own.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from adapters.base import (
    BackendConfig,
    BackendError,
    BackendInfo,
    ConfigError,
    SamplingParams,
    ScheduledChunk,
    Sequence,
    StepOutput,
    UnsupportedModel,
)
from adapters.cores import default_threads
from adapters.models.store import ModelFiles, resolve_model
from adapters.torch_backend import TorchOptions, loading
from adapters.torch_backend.cpu.kernels import CpuKernels, load_kernels
from adapters.torch_backend.model.attention import BLOCK, joined_rows, own_padded_len, padding_is_neutral
from adapters.torch_backend.model.kernel_llama import KernelLlama
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.model.linear import common_row_range
from adapters.torch_backend.packing import PackedStep, RowPlan, StepPacker
from adapters.torch_backend.sampling import choose_tokens, find_likeliest

logger = logging.getLogger(__name__)

_DEFAULT_MODEL_LEN = 4096
_SELF_TEST_TOKENS = 96
"""More than one block of a prompt, and than the windows of small models."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.5e-1, torch.float16: 4e-2}
"""Relative error (root mean square of logits) up to which two passes differ by rounding only. It grows with
the layers, above all of random weights (lab-110m in bf16: 0.07); of a wrong pass it is about 1."""


class TorchBackend:
    """A `Backend` for every causal LM that uses transformers' attention interface, on any device.

    Methods with an underscore are what `CudaTorchBackend` does otherwise.
    """

    _attempts: tuple[tuple[bool, bool], ...] = ((True, True), (False, True))
    """Faster pieces and fast attention, or without, until the self-test passes."""
    _joins_products = False
    _slack = 1.0
    """By how much a right pass may exceed `TOLERANCE`."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model and find out which row counts are safe.

        Raises:
            ConfigError, UnsupportedModel, BackendError: with what to change.
        """
        self._config = config
        self._options = config.options_as(TorchOptions)
        files = resolve_model(config)
        num_threads = config.num_threads or default_threads()
        torch.set_num_threads(num_threads)
        self._device = loading.pick_device(config.device)
        dtype = loading.pick_dtype(files.format or config.dtype, self._device)
        self._dtype_name = str(dtype).removeprefix("torch.")
        model_config = loading.read_config(files.folder)
        limit = getattr(model_config, "max_position_embeddings", None) or _DEFAULT_MODEL_LEN
        if config.max_model_len is not None and config.max_model_len > limit:
            raise ConfigError(
                f"MAX_MODEL_LEN={config.max_model_len} is beyond the {limit} positions of {files.name}"
            )
        max_len = config.max_model_len or min(limit, _DEFAULT_MODEL_LEN)

        self._packer = self._make_packer(max_len)
        kernels = None
        if self._device.type == "cpu" and self._options.cpu_kernels:
            kernels = load_kernels(Path(config.artifacts_dir) / "kernels", dtype, num_threads)
        with torch.inference_mode():
            loaded, path, error = self._load(files, model_config, dtype, kernels)
            self._forward = loaded.forward
            self.module = loaded.module
            gc.collect()
            max_len = self._make_ready(loaded, max_len)
        self._info = BackendInfo(
            backend="torch",
            model=files.name,
            device=str(self._device),
            dtype=self._dtype_name,
            vocab_size=model_config.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            max_batch_size=config.max_batch_size,
            max_model_len=max_len,
            kv_capacity_tokens=config.max_batch_size * max_len,
            num_parameters=loaded.num_parameters,
            model_digest=files.digest,
            num_threads=num_threads,
            details={
                "torch": torch.__version__,
                "forward": path,
                "cpu_kernels": self._packer.kernels is not None,
                "self_test_error": float(f"{error:.1e}"),
                "same_bits_rows": self._packer.rows.described(),
                "attention_padding": "neutral" if self._packer.tight else "by own length",
                "kv_bytes_per_token": self._packer.cache.bytes_per_place,
                **self._more_details(),
            },
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        plan = self._packer.plan(chunks)
        try:
            if isinstance(self.module, KernelLlama):
                tokens = self._step_in_kernels(self.module, plan)
            else:
                tokens = self._step_in_torch(self._packer.packed(plan))
        except torch.OutOfMemoryError as error:
            raise BackendError(f"out of memory in a step of {len(chunks)} rows: lower MAX_BATCH") from error
        except RuntimeError as error:
            raise BackendError(f"the forward pass failed: {error}") from error
        return [StepOutput(seq.seq_id, [token]) for seq, token in zip(plan.sampled, tokens, strict=True)]

    def _step_in_kernels(self, model: KernelLlama, plan: RowPlan) -> list[int]:
        rows = plan.ids, plan.slots, plan.positions
        prompts = joined_rows(plan.blocks)
        logits, likeliest = model.run(self._packer.cache, *rows, plan.num_decodes, prompts, plan.logit_rows)
        return choose_tokens(logits, plan.sampled, likeliest)

    def _step_in_torch(self, batch: PackedStep) -> list[int]:
        with torch.inference_mode():
            logits = self._forward(batch.input_ids, batch.layout, batch.logit_rows)
            likeliest = find_likeliest(logits[: len(batch.sampled)], self._packer.kernels)
            return choose_tokens(logits, batch.sampled, likeliest)

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self._packer.slots.release(seq_id)

    def close(self) -> None:
        del self._forward, self._packer, self.module
        gc.collect()

    def _make_packer(self, max_len: int) -> StepPacker:
        # Room for the padding of the longest row, which is rounded up to a power of two.
        cache = SlotCache(self._config.max_batch_size, own_padded_len(max_len))
        # Elsewhere bits depend on more than this, and each block is a call.
        block = self._config.prefill_chunk if self._device.type == "cpu" else BLOCK
        return StepPacker(cache, max_len, block, self._device)

    def _needs_tiles(self) -> bool:
        return self._device.type == "cpu"

    def _tune(self, loaded: loading.LoadedModel, dtype: torch.dtype, *, flash: bool) -> None:
        """Find out what the packer must know of the batched model."""
        if self._device.type == "cpu":
            self._packer.rows = common_row_range(loaded.module)
            shape = loading.head_shape(loaded.config.get_text_config())
            self._packer.tight = padding_is_neutral(*shape, dtype)

    def _make_ready(self, loaded: loading.LoadedModel, max_len: int) -> int:
        """The last thing before serving; returns how many tokens a sequence may have."""
        return max_len

    def _more_details(self) -> dict[str, str | int | float | bool]:
        return {}

    def _load(
        self, files: ModelFiles, model_config: Any, dtype: torch.dtype, kernels: CpuKernels | None
    ) -> tuple[loading.LoadedModel, str, float]:
        """The first of `_attempts` that agrees with the model's own forward, its path, and its error."""
        limit, error = self._slack * TOLERANCE[dtype], 0.0
        for fast, flash in self._attempts:
            self._packer.kernels = kernels if fast else None
            loaded = loading.load_model(files.folder, model_config, dtype, self._device)
            path, error = self._prepare(loaded, dtype, fast=fast, flash=flash)
            if error <= limit:
                return loaded, path, error
            logger.warning("the %s path is off by %.1e on %s", path, error, files.name)
            del loaded
            gc.collect()
        raise UnsupportedModel(
            f"{files.name} is not supported: its batched pass is off by {error:.1e} (relative root "
            f"mean square) from its own forward, more than the {limit:.0e} of rounding"
        )

    def _prepare(
        self, loaded: loading.LoadedModel, dtype: torch.dtype, *, fast: bool, flash: bool
    ) -> tuple[str, float]:
        """Make the model batched and compare it with its former self; returns the path and the error."""
        num_tokens = min(_SELF_TEST_TOKENS, self._packer.max_len)
        generator = torch.Generator().manual_seed(0)
        ids: list[int] = torch.randint(loaded.config.vocab_size, (num_tokens,), generator=generator).tolist()
        want = loaded.reference(torch.tensor(ids, device=self._device)).float()
        path = loading.make_batched(
            loaded,
            self._device,
            dtype,
            fast=fast,
            kernels=self._packer.kernels,
            max_len=self._packer.max_len,
            tiled=self._needs_tiles(),
            joined=self._joins_products,
        )
        self._tune(loaded, dtype, flash=flash)
        # Most of the text as a prompt, the rest as decode rows, so that reading the cache is tested too.
        probe = Sequence(-1, ids[: num_tokens - 4], SamplingParams(), output_token_ids=ids[num_tokens - 4 :])
        parts = []
        for start, count in [(0, num_tokens - 4), *((p, 1) for p in range(num_tokens - 4, num_tokens))]:
            batch = self._packer.pack([ScheduledChunk(probe, start, count)])
            every_row = torch.arange(self._packer.rows.padded(count), device=self._device)
            parts.append(loaded.forward(batch.input_ids, batch.layout, every_row)[:count])
        self.release([probe.seq_id])
        difference = torch.cat(parts).float() - want
        return path, float(difference.square().mean().sqrt() / want.std())
