"""llama.cpp through the low-level interface of llama-cpp-python.

This module imports no llama_cpp, so that the backend's settings are known before it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapters.base import BackendConfig
from adapters.description import GGUF_FORMATS, BackendDescription, option

if TYPE_CHECKING:
    from adapters.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class LlamaCppOptions:
    n_gpu_layers: int | None = option(
        None,
        "Layers on the accelerator. Unset: all, where the build has one (Metal on Apple silicon, CUDA).",
        ge=-1,
    )
    n_batch: int | None = option(
        None, "Tokens of one decode call, raised to what a step needs.", ge=1, le=1_000_000
    )
    n_ubatch: int | None = option(None, "Tokens computed together. Unset: 512.", ge=1, le=1_000_000)
    kv_type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0"] = option(
        "auto",
        "Number format of keys and values: auto, f32, f16, bf16, q8_0 or q4_0. auto is f16, and f32 "
        "for f32 weights.",
    )


def load_tokenizer(config: BackendConfig) -> Tokenizer:
    """A foreign GGUF file brings its own; a file made here has that of the folder it was made from."""
    from adapters.models import store
    from adapters.models.gguf.store import find_gguf, is_gguf_name

    if not is_gguf_name(config.model):
        return store.load_tokenizer(config, GGUF_FORMATS)
    from adapters.llama_cpp_backend.tokenizer import GgufTokenizer

    return GgufTokenizer.from_file(find_gguf(config.model))


# A prompt in pieces of sixteen takes twice as long as in one, so there is no threshold for long ones.
DESCRIPTION = BackendDescription(
    make="adapters.llama_cpp_backend.backend:LlamaCppBackend",
    tokenizer="adapters.llama_cpp_backend:load_tokenizer",
    extra="llama",
    packages=("llama_cpp", "gguf"),
    options=LlamaCppOptions,
    weights="gguf",
    formats=GGUF_FORMATS,
    dtypes="auto is q4_k_m (smollm2-135m: q4_1, as shipped); others are f32, f16, bf16, q8_0 and q4_1",
)
