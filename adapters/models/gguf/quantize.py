"""llama.cpp's own quantizer: one GGUF file to another in a smaller number format."""

from __future__ import annotations

from pathlib import Path

import llama_cpp.llama_cpp as C

from adapters.base import BackendError
from adapters.models.gguf.llama_log import errors_of

FILE_TYPES: dict[str, int] = {
    "f32": C.LLAMA_FTYPE_ALL_F32,
    "f16": C.LLAMA_FTYPE_MOSTLY_F16,
    "bf16": C.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": C.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_1": C.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q4_k_m": C.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def quantize(source: Path, target: Path, file_format: str, num_threads: int) -> None:
    """Write `target` in `file_format` from `source`.

    Raises:
        BackendError: llama.cpp refused; the message repeats its reason.
    """
    params = C.llama_model_quantize_default_params()
    params.nthread = num_threads
    params.ftype = FILE_TYPES[file_format]
    with errors_of() as errors:
        status = C.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if status != 0:
        target.unlink(missing_ok=True)
        reason = errors.summary() or f"status {status}"
        raise BackendError(f"{source} cannot be quantized to {file_format}: {reason}")
