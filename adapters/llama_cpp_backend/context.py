"""The KV cache and its layout: what llama.cpp is asked to reserve.

Normally each slot has a cache of its own (a split cache), so that a row's attention reads its own tokens
only. Where memory does not suffice for that, all slots share one (a unified cache), and the scheduler keeps
to its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as C

from adapters.base import BackendConfig, BackendError, ConfigError
from adapters.llama_cpp_backend import LlamaCppOptions
from adapters.llama_cpp_backend.loading import LlamaModel, cache_room, out_of_memory
from adapters.models.gguf.llama_log import errors_of
from adapters.models.store import pick_model_len

_CELLS = 256
"""llama.cpp rounds a cache up to multiples of this."""
_DEFAULT_UBATCH = 512

KV_TYPES: dict[str, tuple[int, float]] = {
    "f32": (C.GGML_TYPE_F32, 4.0),
    "f16": (C.GGML_TYPE_F16, 2.0),
    "bf16": (30, 2.0),  # GGML_TYPE_BF16, which the bindings do not name
    "q8_0": (C.GGML_TYPE_Q8_0, 34 / 32),
    "q4_0": (C.GGML_TYPE_Q4_0, 18 / 32),
}
"""llama.cpp's number and the bytes of one value."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of llama.cpp, worked out before anything is reserved."""

    max_model_len: int
    num_cells: int
    """Of the whole cache, for all slots together."""
    unified: bool
    kv_type: str
    flash_attention: bool
    batch_tokens: int
    ubatch_tokens: int


def plan_context(config: BackendConfig, model: LlamaModel) -> Limits:
    """Choose the layout of the cache.

    Raises:
        ConfigError: a setting that cannot work with this model.
        BackendError: not even one sequence of full length fits into memory.
    """
    max_slots = C.llama_max_parallel_sequences()
    if config.max_batch_size > max_slots:
        raise ConfigError(
            f"MAX_BATCH={config.max_batch_size}, but llama.cpp runs {max_slots} sequences at most"
        )
    max_len = pick_model_len(config, C.llama_model_n_ctx_train(model.pointer), model.path.name)
    options = config.options_as(LlamaCppOptions)
    kv_type = _kv_type(options.kv_type, model.file_format)
    cells_of_slot = -(-max_len // _CELLS) * _CELLS
    wanted_cells = config.max_batch_size * cells_of_slot
    num_cells, unified = wanted_cells, config.max_batch_size == 1
    per_cell = model.kv_bytes_per_token(KV_TYPES[kv_type][1])
    if model.num_gpu_layers == 0:
        room = cache_room(config.kv_memory_fraction)
        if wanted_cells * per_cell > room:
            num_cells, unified = int(room / per_cell) // _CELLS * _CELLS, True
        if num_cells < cells_of_slot:
            raise out_of_memory(cells_of_slot * per_cell, f"keys and values of {max_len} tokens")
    # A step has MAX_STEP_TOKENS at most, and the rows that fill gaps between slots.
    batch = max(options.n_batch or 0, config.max_step_tokens + config.max_batch_size)
    ubatch = options.n_ubatch or _DEFAULT_UBATCH
    # Flash attention reads fp32 caches as fp16, so full precision takes the plain path.
    return Limits(max_len, num_cells, unified, kv_type, kv_type != "f32", batch, min(ubatch, batch))


def open_context(model: LlamaModel, limits: Limits, num_slots: int, num_threads: int) -> Any:
    """llama.cpp's context; free it with `llama_free`.

    Raises:
        BackendError: llama.cpp cannot reserve it; the message repeats its reason.
    """
    params = C.llama_context_default_params()
    params.n_ctx = limits.num_cells
    params.n_seq_max = num_slots
    params.kv_unified = limits.unified
    params.n_batch = limits.batch_tokens
    params.n_ubatch = limits.ubatch_tokens
    params.n_outputs_max = num_slots
    params.n_threads = params.n_threads_batch = num_threads
    params.type_k = params.type_v = KV_TYPES[limits.kv_type][0]
    params.flash_attn_type = (
        C.LLAMA_FLASH_ATTN_TYPE_AUTO if limits.flash_attention else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.no_perf = True
    with errors_of() as errors:
        context = C.llama_init_from_model(model.pointer, params)
    if not context:
        raise BackendError(
            f"llama.cpp cannot reserve a cache of {limits.num_cells} tokens for {model.path.name} "
            f"({errors.summary() or 'it does not say why'}); lower MAX_BATCH or MAX_MODEL_LEN"
        )
    return context


def _kv_type(asked: str, file_format: str) -> str:
    """`auto`: llama.cpp's fp16, and fp32 for a file of fp32 weights, which is asked for to be exact."""
    if asked == "auto":
        return "f32" if file_format == "f32" else "f16"
    if asked not in KV_TYPES:
        raise ConfigError(f"KV_TYPE={asked} is none of {', '.join(['auto', *KV_TYPES])}")
    return asked
