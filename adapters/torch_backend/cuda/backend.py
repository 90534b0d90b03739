"""The torch backend on a CUDA device: steps overlap with the planning of the next one.

Everything particular to the device is behind `Machine`: tests run all of this on a CPU with a stand-in.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence as Seq

import torch

from adapters.base import BackendConfig, BackendError, ScheduledChunk, StepOutput
from adapters.torch_backend.cuda.machine import CudaMachine, Machine
from adapters.torch_backend.cuda.startup import CudaSetup
from adapters.torch_backend.cuda.steps import ADVICE, LaunchedStep, StepLauncher
from adapters.torch_backend.loading import pick_device
from adapters.torch_backend.startup import make_ready


class CudaTorchBackend:
    """An `OverlappingBackend`."""

    def __init__(self, config: BackendConfig, machine: Machine | None = None) -> None:
        """Raises: as `make_ready`."""
        machine = machine or CudaMachine(pick_device(config.device))
        setup = CudaSetup(config, machine)
        try:
            loaded, self.info = make_ready(config, setup)
        except torch.OutOfMemoryError as error:
            raise BackendError(f"out of memory while loading {config.model}: {ADVICE}") from error
        self.module = loaded.module
        self._packer = setup.packer
        self._launcher = StepLauncher(machine, setup.packer, loaded.forward, setup.graphs, setup.mixed_graphs)

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        return self.launch(chunks).result()

    def launch(self, chunks: Seq[ScheduledChunk]) -> LaunchedStep:
        """Start a step and return at once."""
        return self._launcher.launch(self._packer.plan(chunks))

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self._packer.slots.release(seq_id)

    def close(self) -> None:
        del self._launcher, self._packer, self.module
        gc.collect()
