"""ONNX Runtime on a decoder that onnxruntime-genai's builder exports.

This module imports no onnxruntime, so that the backend's settings are known before it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters.description import BackendDescription, option

FORMATS = {"fp32": "fp32", "f32": "fp32", "int4": "int4"}
"""Of the exported weights; keys and values are fp32 with both."""


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    onnx_provider: Literal["cpu", "cuda", "coreml", "dml"] = option(
        "cpu",
        "Execution provider: cpu, or, not verified, cuda, coreml or dml. Operators that it has no kernel for "
        "run on the CPU.",
    )


DESCRIPTION = BackendDescription(
    make="adapters.onnx_backend.backend:OnnxBackend",
    extra="onnx",
    packages=("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir"),
    options=OnnxOptions,
    formats=FORMATS,
    dtypes="auto is fp32; the other is int4",
)
