"""ONNX Runtime on a decoder that onnxruntime-genai's builder exports.

This module imports no onnxruntime, so that the backend's settings are known before it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapters.base import BackendConfig
from adapters.description import BackendDescription, option

if TYPE_CHECKING:
    from adapters.text.tokenizer import Tokenizer

FORMATS = {"fp32": "fp32", "f32": "fp32", "int4": "int4"}
"""Of the exported weights; keys and values are fp32 with both."""


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    onnx_provider: Literal["cpu", "cuda", "coreml", "dml"] = option(
        "cpu", "Execution provider: cpu, or, not verified, cuda, coreml or dml."
    )


def load_tokenizer(config: BackendConfig) -> Tokenizer:
    from adapters.models import store

    return store.load_tokenizer(config, FORMATS)


DESCRIPTION = BackendDescription(
    make="adapters.onnx_backend.backend:OnnxBackend",
    tokenizer="adapters.onnx_backend:load_tokenizer",
    extra="onnx",
    packages=("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir"),
    options=OnnxOptions,
    formats=FORMATS,
)
