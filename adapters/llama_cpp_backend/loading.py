"""A GGUF file as a loaded model.

llama.cpp answers a failed load with a null pointer and lines in its log; these become one sentence here.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C
import psutil

from adapters.base import BackendError, ConfigError, UnsupportedModel
from adapters.models.gguf.llama_log import errors_of
from adapters.models.gguf.quantize import FILE_TYPES
from adapters.models.gguf.store import gguf_parts

ALL_LAYERS = -1
_SPARE_BYTES = 256 << 20
"""For llama.cpp's working memory; what a step needs depends on the model and is far less for small ones."""

_started = False


@dataclass(frozen=True, slots=True)
class LlamaModel:
    """`pointer` is llama.cpp's; whoever has it frees it once with `llama_model_free`."""

    pointer: Any
    vocab: Any
    path: Path
    num_gpu_layers: int

    @property
    def file_format(self) -> str:
        """The number format of the weights in the spelling of MODEL's suffix, as far as there is one."""
        file_type = C.llama_model_ftype(self.pointer)
        for name, number in FILE_TYPES.items():
            if number == file_type:
                return name
        name = C.llama_ftype_name(file_type)
        return name.decode().lower() if name else "unknown"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer."""
        num_tokens = C.llama_vocab_n_tokens(self.vocab)
        return tuple(i for i in range(num_tokens) if C.llama_vocab_is_eog(self.vocab, i))

    def kv_bytes_per_token(self, bytes_per_value: float) -> float:
        """What one token takes in the cache, all layers together."""
        num_heads = max(1, C.llama_model_n_head(self.pointer))
        default = C.llama_model_n_embd(self.pointer) // num_heads
        width = sum(
            int(self.metadata(f"attention.{kind}_length") or default) for kind in ("key", "value")
        ) * C.llama_model_n_head_kv(self.pointer)
        return float(C.llama_model_n_layer(self.pointer) * width * bytes_per_value)

    def metadata(self, key: str) -> str | None:
        """The text of a metadata field; a key without its architecture's prefix gets it."""
        for name in (key, f"{self._text('general.architecture')}.{key}"):
            text = self._text(name)
            if text is not None:
                return text
        return None

    def _text(self, key: str) -> str | None:
        size = C.llama_model_meta_val_str(self.pointer, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        C.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")


def load_model(path: Path, *, num_gpu_layers: int = 0, vocab_only: bool = False) -> LlamaModel:
    """Load a model, or only its tokenizer.

    Raises:
        ConfigError: there is no such file, or it is none of GGUF.
        UnsupportedModel: llama.cpp does not know its architecture, or its rows cannot share a batch here.
        BackendError: it is damaged, or memory does not suffice.
    """
    _check_file(path)
    _start()
    num_bytes = sum(part.stat().st_size for part in gguf_parts(path))
    if not vocab_only and num_gpu_layers == 0 and num_bytes > cache_room(1.0):
        raise out_of_memory(num_bytes, f"the weights of {path.name}")
    params = C.llama_model_default_params()
    params.n_gpu_layers = num_gpu_layers
    params.vocab_only = vocab_only
    with errors_of() as errors:
        pointer = C.llama_model_load_from_file(str(path).encode(), params)
    if not pointer:
        raise _load_error(path, errors.summary())
    model = LlamaModel(pointer, C.llama_model_get_vocab(pointer), path, num_gpu_layers)
    if not vocab_only:
        try:
            _check_kind(model)
        except UnsupportedModel:
            C.llama_model_free(pointer)
            raise
    return model


def pick_gpu_layers(device: str, asked: int | None) -> int:
    """How many layers go to an accelerator: all where this build has one, unless told.

    Raises:
        ConfigError: an accelerator is asked for that this build of llama.cpp does not have.
    """
    if device == "cpu":
        return 0
    if C.llama_supports_gpu_offload():
        return ALL_LAYERS if asked is None else asked
    if device != "auto" or asked:
        name = f"DEVICE={device}" if device != "auto" else f"N_GPU_LAYERS={asked}"
        raise ConfigError(
            f"{name}, but this build of llama.cpp computes on the CPU only; docs/llama-cpp.md says how to "
            "build it for CUDA or Metal"
        )
    return 0


def device_name(model: LlamaModel) -> str:
    if model.num_gpu_layers == 0:
        return "cpu"
    return "metal" if sys.platform == "darwin" else "gpu"


def cache_room(fraction: float) -> float:
    """The bytes that keys and values may take: this fraction of free memory, some left for working."""
    available = psutil.virtual_memory().available
    return min(available * fraction, available - _SPARE_BYTES)


def out_of_memory(num_bytes: float, what: str) -> BackendError:
    available = psutil.virtual_memory().available
    return BackendError(
        f"not enough memory: {what} take {num_bytes / 1e9:.2f} GB and {available / 1e9:.2f} GB are free; "
        "take a smaller model or format (q4_k_m), or lower MAX_BATCH or MAX_MODEL_LEN"
    )


def _start() -> None:
    global _started
    if not _started:
        with errors_of():
            C.llama_backend_init()
        _started = True


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"MODEL={path} does not exist; give the path of a .gguf file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ConfigError(f"MODEL={path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise ConfigError(f"MODEL={path} is not a GGUF file: it does not start with the letters GGUF")


def _check_kind(model: LlamaModel) -> None:
    pointer, name = model.pointer, model.path.name
    if C.llama_model_has_encoder(pointer) or not C.llama_model_has_decoder(pointer):
        raise UnsupportedModel(f"{name} has an encoder; only decoder-only language models are served")
    if C.llama_model_is_recurrent(pointer) or C.llama_model_is_hybrid(pointer):
        raise UnsupportedModel(
            f"{name} is a recurrent model: its state cannot be taken back by a token, which rows that share "
            "a batch need here"
        )


def _load_error(path: Path, reason: str) -> BackendError:
    if "unknown model architecture" in reason:
        return UnsupportedModel(f"{path.name}: llama.cpp does not know its architecture ({reason})")
    for sign in ("not within the file bounds", "failed to read", "failed to load model from", "corrupted"):
        if sign in reason:
            return BackendError(f"{path} is cut off or damaged ({reason}); fetch or make it again")
    if "alloc" in reason:
        return BackendError(f"not enough memory to load {path} ({reason}); take a smaller model or format")
    return BackendError(f"llama.cpp cannot load {path}: {reason or 'it does not say why'}")
