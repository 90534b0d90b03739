"""Which torch backend serves which device: only CUDA's offers to overlap steps with their planning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.base import BackendConfig
from adapters.torch_backend.backend import TorchBackend
from adapters.torch_backend.loading import pick_device

if TYPE_CHECKING:
    from adapters.torch_backend.cuda.backend import CudaTorchBackend


def create(config: BackendConfig) -> TorchBackend | CudaTorchBackend:
    """Raises: as `startup.make_ready`."""
    if pick_device(config.device).type != "cuda":
        return TorchBackend(config)
    from adapters.torch_backend.cuda.backend import CudaTorchBackend

    return CudaTorchBackend(config)
