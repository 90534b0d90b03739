"""MLX on an mlx-lm model: Metal on Apple silicon; on Linux its CPU route, to check tokens rather than speed.

This module imports no mlx, so that the backend is known before it is installed.
"""

from __future__ import annotations

from adapters.description import BackendDescription

DESCRIPTION = BackendDescription(
    make="adapters.mlx_backend.backend:MlxBackend",
    extra="mlx",
    packages=("mlx", "mlx_lm"),
    dtypes="auto is fp32 on a CPU, else the format of the weights",
)
