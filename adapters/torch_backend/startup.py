"""From a configuration to a model that may serve.

No model serves before its batched pass was compared with its own forward pass over the same tokens: a
mistake in a fast path would show as worse text, not as an error. Faster paths are tried first.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from adapters.base import (
    BackendConfig,
    BackendInfo,
    SamplingParams,
    ScheduledChunk,
    Sequence,
    UnsupportedModel,
)
from adapters.cores import default_threads
from adapters.models.store import DEFAULT_MODEL_LEN, ModelFiles, pick_model_len, resolve_model
from adapters.torch_backend import TorchOptions, loading
from adapters.torch_backend.cpu.kernels import CpuKernels, load_kernels
from adapters.torch_backend.loading import LoadedModel
from adapters.torch_backend.model.attention import BLOCK, own_padded_len, padding_is_neutral
from adapters.torch_backend.model.kernel_llama import KernelLlama
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.model.linear import common_row_range
from adapters.torch_backend.model.llama_forward import FusedOps
from adapters.torch_backend.model.llama_shape import llama_shape
from adapters.torch_backend.packing import StepPacker

logger = logging.getLogger(__name__)

_SELF_TEST_TOKENS = 96
"""More than one block of a prompt, and than the windows of small models."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.5e-1, torch.float16: 4e-2}
"""Relative error (root mean square of logits) up to which two passes differ by rounding only. It grows with
the layers, above all of random weights (lab-110m in bf16: 0.07); of a wrong pass it is about 1."""

Details = dict[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A path to try: with our faster pieces in place of the model's own code, with flash attention."""

    fast: bool
    flash: bool = False


class DeviceSetup(Protocol):
    """What differs between kinds of devices while a model is made ready; called in this order."""

    device: torch.device
    attempts: tuple[Attempt, ...]
    slack: float
    """By how much a right pass may exceed `TOLERANCE`."""
    tiled: bool
    """Every linear layer is one of ours, whose rows can be computed in tiles of a fixed number."""
    joined: bool
    """Gate and up of the faster pieces are one product."""

    def make_packer(self, max_len: int, dtype: torch.dtype, num_threads: int) -> StepPacker: ...

    def fused(self, loaded: LoadedModel) -> FusedOps | None:
        """What takes over the small parts of the faster pieces, checked on this device."""
        ...

    def tune(self, loaded: LoadedModel, *, flash: bool) -> None:
        """Find out what the packer must know of the batched model; once an attempt."""
        ...

    def make_ready(self, loaded: LoadedModel, max_len: int) -> int:
        """The last thing before serving; returns how many tokens a sequence may have."""
        ...

    def details(self) -> Details: ...


class PlainSetup:
    """A CPU, or an accelerator whose steps do not overlap."""

    attempts: tuple[Attempt, ...] = (Attempt(fast=True), Attempt(fast=False))
    slack = 1.0
    joined = False

    def __init__(self, config: BackendConfig) -> None:
        self.device = loading.pick_device(config.device)
        self.tiled = self._is_cpu = self.device.type == "cpu"
        self._config = config

    def make_packer(self, max_len: int, dtype: torch.dtype, num_threads: int) -> StepPacker:
        config = self._config
        # Room for the padding of the longest row, which is rounded up to a power of two.
        cache = SlotCache(config.max_batch_size, own_padded_len(max_len))
        # Elsewhere bits depend on more than this, and each block is a call.
        block = config.prefill_chunk if self._is_cpu else BLOCK
        self.packer = StepPacker(cache, max_len, block, self.device)
        if self._is_cpu:
            self.packer.kernels = _kernels(config, dtype, num_threads)
        return self.packer

    def fused(self, loaded: LoadedModel) -> FusedOps | None:
        return None

    def tune(self, loaded: LoadedModel, *, flash: bool) -> None:
        if self._is_cpu:
            self.packer.rows = common_row_range(loaded.module)
            shape = loading.head_shape(loaded.config.get_text_config())
            self.packer.tight = padding_is_neutral(*shape, loaded.dtype)

    def make_ready(self, loaded: LoadedModel, max_len: int) -> int:
        return max_len

    def details(self) -> Details:
        return {}


def make_ready(config: BackendConfig, setup: DeviceSetup) -> tuple[LoadedModel, BackendInfo]:
    """Load the model, find a path that agrees with it, and which row counts are safe.

    Raises:
        ConfigError, UnsupportedModel, BackendError: with what to change.
    """
    files = resolve_model(config)
    num_threads = config.num_threads or default_threads()
    torch.set_num_threads(num_threads)
    model_config = loading.read_config(files.folder)
    dtype = loading.pick_dtype(
        files.format or config.dtype,
        setup.device,
        partial(_runs_in_kernels, model_config, config, num_threads),
    )
    trained = getattr(model_config, "max_position_embeddings", None) or DEFAULT_MODEL_LEN
    max_len = pick_model_len(config, trained, files.name)
    packer = setup.make_packer(max_len, dtype, num_threads)
    with torch.inference_mode():
        loaded, path, error = _load(files, model_config, dtype, setup, packer)
        gc.collect()
        max_len = setup.make_ready(loaded, max_len)
    return loaded, BackendInfo(
        backend="torch",
        model=files.name,
        device=str(setup.device),
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=model_config.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
        max_batch_size=config.max_batch_size,
        max_model_len=max_len,
        kv_capacity_tokens=config.max_batch_size * max_len,
        num_parameters=loaded.num_parameters,
        model_digest=files.digest,
        num_threads=num_threads,
        has_kv_blocks=packer.has_blocks,
        computes_padding=setup.device.type == "cpu",
        details={
            "torch": str(torch.__version__),  # a class of torch's own, which would make the API load torch
            "forward": path,
            "cpu_kernels": packer.kernels is not None,
            "cpu_kernel_parts": packer.kernels.described() if packer.kernels else "none",
            "self_test_error": float(f"{error:.1e}"),
            "same_bits_rows": packer.rows.described(),
            "attention_padding": "neutral" if packer.tight else "by own length",
            "kv_bytes_per_token": packer.cache.bytes_per_position,
            **setup.details(),
        },
    )


def _kernels(config: BackendConfig, dtype: torch.dtype, num_threads: int) -> CpuKernels | None:
    if not config.options_as(TorchOptions).cpu_kernels:
        return None
    return load_kernels(Path(config.artifacts_dir) / "kernels", dtype, num_threads)


def _runs_in_kernels(model_config: Any, config: BackendConfig, num_threads: int) -> bool:
    """True where a step of the model in bf16 is one call of the compiled kernels on this CPU."""
    shape = llama_shape(model_config)
    kernels = _kernels(config, torch.bfloat16, num_threads) if shape else None
    return shape is not None and kernels is not None and KernelLlama.covers(shape, kernels)


def _load(
    files: ModelFiles, model_config: Any, dtype: torch.dtype, setup: DeviceSetup, packer: StepPacker
) -> tuple[LoadedModel, str, float]:
    """The first of the attempts that agrees with the model's own forward, its path, and its error."""
    limit, error = setup.slack * TOLERANCE[dtype], 0.0
    for attempt in setup.attempts:
        if not attempt.fast:
            packer.kernels = None
        loaded = loading.load_model(files.folder, model_config, dtype, setup.device)
        path, error = _prepare(loaded, setup, packer, attempt)
        if error <= limit:
            return loaded, path, error
        logger.warning("the %s path is off by %.1e on %s", path, error, files.name)
        del loaded  # so that two models never share the memory
        gc.collect()
    raise UnsupportedModel(
        f"{files.name} is not supported: its batched pass is off by {error:.1e} (relative root "
        f"mean square) from its own forward, more than the {limit:.0e} of rounding"
    )


def _prepare(
    loaded: LoadedModel, setup: DeviceSetup, packer: StepPacker, attempt: Attempt
) -> tuple[str, float]:
    """Make the model batched and compare it with its former self; returns the path and the error."""
    num_tokens = min(_SELF_TEST_TOKENS, packer.max_len)
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(loaded.config.vocab_size, (num_tokens,), generator=generator).tolist()
    want = loaded.reference(torch.tensor(ids, device=setup.device)).float()
    path = loading.make_batched(
        loaded,
        fast=attempt.fast,
        kernels=packer.kernels,
        max_len=packer.max_len,
        tiled=setup.tiled,
        joined=setup.joined,
        fused=setup.fused(loaded) if attempt.fast else None,
    )
    setup.tune(loaded, flash=attempt.flash)
    # Most of the text as a prompt, the rest as decode rows, so that reading the cache is tested too.
    probe = Sequence(-1, ids[: num_tokens - 4], SamplingParams(), output_token_ids=ids[num_tokens - 4 :])
    parts = []
    for start, count in [(0, num_tokens - 4), *((p, 1) for p in range(num_tokens - 4, num_tokens))]:
        batch = packer.pack([ScheduledChunk(probe, start, count)])
        every_row = torch.arange(packer.rows.padded(count), device=setup.device)
        parts.append(loaded.forward(batch.input_ids, batch.layout, every_row)[:count])
    packer.slots.release(probe.seq_id)
    difference = torch.cat(parts).float() - want
    return path, float(difference.square().mean().sqrt() / want.std())
