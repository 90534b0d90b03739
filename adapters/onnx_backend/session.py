"""The exported decoder over one cache of slots.

Each layer's keys and values are one array `(slots, heads, positions, width)`. A run binds a stretch of slots
as the past and the same memory as the present, so that nothing is copied. The rows of a run are therefore
neighbours, and all have the same number of tokens: decode rows go together, each prompt chunk alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from adapters.base import BackendError, ConfigError
from adapters.lazy_memory import lazy_zeros

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
}


def check_provider(provider: str) -> None:
    """Raises: ConfigError: this onnxruntime has no such execution provider."""
    here = ort.get_available_providers()
    if PROVIDERS[provider] not in here:
        names = ", ".join(name for name, known in PROVIDERS.items() if known in here)
        raise ConfigError(f"ONNX_PROVIDER={provider}: this onnxruntime was built with {names}")


class DecoderSession:
    def __init__(
        self, path: Path, provider: str, num_threads: int, num_slots: int, max_model_len: int
    ) -> None:
        """Load the model; the cache takes memory as its positions are written.

        Raises:
            BackendError: onnxruntime cannot load the model, or not with this execution provider.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        wanted = PROVIDERS[provider]
        # What it has no kernel for runs on the CPU.
        providers = [*dict.fromkeys((wanted, PROVIDERS["cpu"]))]
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers)
        except Exception as error:  # its classes have no common base
            raise BackendError(f"onnxruntime cannot load {path}: {error}") from error
        if wanted not in self._session.get_providers():  # onnxruntime goes on without it
            raise BackendError(f"onnxruntime cannot start its {wanted}: its lines above say why")
        past = [entry for entry in self._session.get_inputs() if entry.name.startswith("past_key_values.")]
        heads, width = past[0].shape[1], _head_width(path, past[0].shape[3])
        shape = (num_slots, heads, max_model_len, width)
        self._caches = {
            entry.name: lazy_zeros(4 * math.prod(shape)).view(np.float32).reshape(shape) for entry in past
        }
        (logits,) = [entry for entry in self._session.get_outputs() if entry.name == "logits"]
        self.vocab_size: int = logits.shape[-1]
        self.kv_bytes_per_token = len(past) * heads * width * 4

    def run(self, first_slot: int, token_ids: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
        """As `SlotDecoder.run`."""
        num_rows = len(lengths)
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        logits = np.empty((num_rows, 1, self.vocab_size), dtype=np.float32)
        binding = self._session.io_binding()
        _bind(binding.bind_input, "input_ids", token_ids)
        _bind(binding.bind_input, "attention_mask", mask)
        _bind(binding.bind_output, "logits", logits)
        for name, cache in self._caches.items():
            stretch = cache[first_slot : first_slot + num_rows]
            _bind(binding.bind_input, name, stretch)
            _bind(binding.bind_output, name.replace("past_key_values", "present"), stretch)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"onnxruntime failed in a run of {num_rows} rows: {error}") from error
        return logits[:, 0]


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    """By address, so that past and present can share it; the array must outlive the run."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _head_width(path: Path, declared: int | str) -> int:
    """The builder may leave it open in the graph; it always writes it into its own configuration."""
    if isinstance(declared, int):
        return declared
    config = json.loads((path.parent / "genai_config.json").read_text("utf-8"))
    width: int = config["model"]["decoder"]["head_size"]
    return width
