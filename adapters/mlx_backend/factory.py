"""Puts another BLAS in front of MLX's, which has to happen before MLX is imported."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from adapters.base import BackendConfig, ConfigError
from adapters.cores import default_threads
from adapters.mlx_backend import MlxOptions

if TYPE_CHECKING:
    from adapters.mlx_backend.backend import MlxBackend


def create(config: BackendConfig) -> MlxBackend:
    """Raises: as `MlxBackend`, and ConfigError where MLX_BLAS cannot be loaded."""
    blas = config.options_as(MlxOptions).mlx_blas
    if blas is not None:
        _put_in_front(blas, config.num_threads or default_threads())
    from adapters.mlx_backend.backend import MlxBackend

    return MlxBackend(config)


def _put_in_front(library: str, num_threads: int) -> None:
    """What is loaded for all comes before a library's own dependencies when its symbols are looked up."""
    os.environ["OPENBLAS_NUM_THREADS"] = str(num_threads)  # OpenBLAS reads it as it is loaded
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ConfigError(f"MLX_BLAS={library} cannot be loaded: {error}") from error
