"""The llama.cpp backend: one `llama_decode` a step over prompt chunks and decode rows of many sequences.

Tokens are chosen by the lab's own rule from llama.cpp's logits, so that seeds mean the same as with torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from adapters.base import (
    BackendConfig,
    BackendError,
    BackendInfo,
    CapacityError,
    ScheduledChunk,
    StepOutput,
)
from adapters.cores import default_threads
from adapters.llama_cpp_backend import LlamaCppOptions
from adapters.llama_cpp_backend.batch import StepBatch
from adapters.llama_cpp_backend.context import open_context, plan_context
from adapters.llama_cpp_backend.loading import LlamaModel, device_name, load_model, pick_gpu_layers
from adapters.llama_cpp_backend.slots import SlotTable
from adapters.models.gguf.store import GgufFile, resolve_gguf
from adapters.sampling import sampled_outputs
from adapters.text.tokenizer import HFTokenizer

_NO_ROOM = 1
"""What `llama_decode` returns when the cache has no room for the tokens."""


class LlamaCppBackend:
    """A `Backend` for every decoder-only model that llama.cpp loads."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model and reserve its cache.

        Raises:
            ConfigError, UnsupportedModel, BackendError: with what to change.
        """
        file = resolve_gguf(config)
        num_threads = config.num_threads or default_threads()
        layers = pick_gpu_layers(config.device, config.options_as(LlamaCppOptions).n_gpu_layers)
        self._model = load_model(file.path, num_gpu_layers=layers)
        self.context: Any = None
        """llama.cpp's own; for tools that measure beside the adapter."""
        try:
            limits = plan_context(config, self._model)
            self.context = open_context(self._model, limits, config.max_batch_size, num_threads)
        except BaseException:
            self.close()
            raise
        self._memory = C.llama_get_memory(self.context)
        self._batch = StepBatch(limits.batch_tokens)
        self._slots = SlotTable(
            config.max_batch_size,
            limits.max_model_len,
            limits.batch_tokens - config.max_batch_size,
            split=not limits.unified,
        )
        vocab_size = C.llama_vocab_n_tokens(self._model.vocab)
        self._vocab_size = vocab_size
        flash = limits.flash_attention
        self._info = BackendInfo(
            backend="llama_cpp",
            model=file.name,
            device=device_name(self._model),
            dtype=self._model.file_format,
            vocab_size=vocab_size,
            eos_token_ids=_eos_token_ids(file, self._model),
            max_batch_size=config.max_batch_size,
            max_model_len=limits.max_model_len,
            kv_capacity_tokens=min(limits.num_cells, config.max_batch_size * limits.max_model_len),
            num_parameters=C.llama_model_n_params(self._model.pointer),
            model_digest=file.digest,
            num_threads=C.llama_n_threads(self.context),
            details={
                "llama_cpp": C.llama_version().decode(),
                "system_info": C.llama_print_system_info().decode().strip(" |"),
                "file": file.path.name,
                "kv_cache": "unified" if limits.unified else "split",
                "kv_cells": limits.num_cells,
                "kv_type": limits.kv_type,
                "flash_attention": "auto" if flash else "off",
                "n_threads_batch": C.llama_n_threads_batch(self.context),
                "n_batch": C.llama_n_batch(self.context),
                "n_ubatch": C.llama_n_ubatch(self.context),
                "n_gpu_layers": self._model.num_gpu_layers,
            },
            has_logprobs=True,
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        rows = self._slots.lay_out(chunks)
        if rows.moved is not None:
            source, target = rows.moved
            C.llama_memory_seq_cp(self._memory, source, target, -1, -1)
            C.llama_memory_seq_rm(self._memory, source, -1, -1)
        for slot, position in rows.rewound:
            C.llama_memory_seq_rm(self._memory, slot, position, -1)
        batch = self._batch.fill(rows.tokens, rows.positions, rows.slots, rows.wanted)
        status = C.llama_decode(self.context, batch)
        if status != 0:
            raise self._failure(status, chunks)
        self._slots.commit(chunks)
        if not rows.wanted:
            C.llama_synchronize(self.context)
            return []
        logits = self.logits(len(rows.wanted))
        return sampled_outputs(logits, [*enumerate(rows.sampled)])

    def logits(self, num_rows: int) -> NDArray[np.float32]:
        """A view of the last step's logits `(num_rows, vocabulary)`; the next step overwrites them."""
        address = ctypes.cast(C.llama_get_logits(self.context), ctypes.c_void_p).value
        assert address is not None, "a step that samples has logits"
        buffer = (ctypes.c_float * (num_rows * self._vocab_size)).from_address(address)
        return np.frombuffer(buffer, dtype=np.float32).reshape(num_rows, self._vocab_size)

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            slot = self._slots.release(seq_id)
            if slot is not None:
                C.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def close(self) -> None:
        if self.context:
            C.llama_free(self.context)
            self.context = None
        if self._model is not None:
            C.llama_model_free(self._model.pointer)
            del self._model

    def _failure(self, status: int, chunks: Seq[ScheduledChunk]) -> BackendError | CapacityError:
        """Put the cache back to what it was before the step."""
        for slot, position in self._slots.roll_back(chunks):
            C.llama_memory_seq_rm(self._memory, slot, position, -1)
        if status == _NO_ROOM:
            return CapacityError(f"the cache has no room for a step of {len(chunks)} rows: lower MAX_BATCH")
        return BackendError(f"llama_decode failed with status {status} in a step of {len(chunks)} rows")


def _eos_token_ids(file: GgufFile, model: LlamaModel) -> tuple[int, ...]:
    """What ends an answer; a file made from a Hugging Face folder ends it as that folder says."""
    of_folder = HFTokenizer.from_folder(file.folder).eos_token_ids if file.folder else ()
    return of_folder or model.eos_token_ids
