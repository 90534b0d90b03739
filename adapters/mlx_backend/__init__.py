"""MLX on an mlx-lm model: Metal on Apple silicon; on Linux its CPU route, to check tokens rather than speed.

This module imports no mlx, so that the backend's settings are known before it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.description import BackendDescription, option


@dataclass(frozen=True, slots=True)
class MlxOptions:
    mlx_blas: str | None = option(
        None,
        "A BLAS that computes in place of the plain one of MLX's package for Linux, as in libopenblas.so.0 "
        "(a library's name or path).",
    )


DESCRIPTION = BackendDescription(
    make="adapters.mlx_backend.factory:create",
    extra="mlx",
    packages=("mlx", "mlx_lm"),
    options=MlxOptions,
    dtypes="auto is fp32 on a CPU, else the format of the weights",
)
