"""Which torch backend serves which device.

On CUDA it is one whose steps overlap with their planning; elsewhere the plain one, which does not offer to.
"""

from __future__ import annotations

from adapters.base import BackendConfig
from adapters.torch_backend.backend import TorchBackend
from adapters.torch_backend.loading import pick_device


def create(config: BackendConfig) -> TorchBackend:
    """Raises: as `TorchBackend`."""
    if pick_device(config.device).type != "cuda":
        return TorchBackend(config)
    from adapters.torch_backend.cuda.backend import CudaTorchBackend

    return CudaTorchBackend(config)
