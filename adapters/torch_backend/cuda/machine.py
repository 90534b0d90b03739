"""The few things that only a CUDA device has: pinned memory, events, graphs, a count of free bytes.

They are behind a protocol, so that everything built on them runs in tests on a CPU with stand-ins.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.base import BackendError
from adapters.torch_backend.cuda.fused import triton_ops
from adapters.torch_backend.model.flash_attention import LEAST_CAPABILITY, AttentionOp, flash_attention
from adapters.torch_backend.model.llama_forward import FusedOps

_RECOVERS_FROM_CAPTURE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)
"""Older versions can be left capturing, and their allocator with a pool that never ends."""


class Event(Protocol):
    def record(self) -> Any: ...

    def synchronize(self) -> Any: ...


class StepGraph(Protocol):
    """Device work that was written down once and can be done again over the same tensors."""

    def capture(self, work: Callable[[], None]) -> None:
        """Raises what `work` raises; BackendError where the device cannot be used after that."""
        ...

    def replay(self) -> None: ...


class Machine(Protocol):
    @property
    def device(self) -> torch.device: ...

    @property
    def attention(self) -> AttentionOp | None:
        """The variable-length attention of this device, if it has one."""
        ...

    def fused_ops(self) -> FusedOps | None:
        """The small parts of a decode step in one launch each, if this device has them; not checked yet."""
        ...

    def make_current(self) -> None:
        """Events, graphs and kernels of this thread are this device's from now on."""
        ...

    def wait(self) -> None:
        """Until the device has nothing left to do; raises what ended it, if anything did."""
        ...

    def free_bytes(self) -> int: ...

    def pinned(self, num_words: int) -> Tensor:
        """Host memory `(num_words,)` int64 that the device copies from and to while the host goes on."""
        ...

    def event(self) -> Event: ...

    def graph(self) -> StepGraph: ...


class CudaMachine:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._pool: Any = None
        self._stream: Any = None
        self.make_current()

    def make_current(self) -> None:
        torch.cuda.set_device(self._index)

    @property
    def attention(self) -> AttentionOp | None:
        return flash_attention if torch.cuda.get_device_capability() >= LEAST_CAPABILITY else None

    def fused_ops(self) -> FusedOps | None:
        return triton_ops()

    def wait(self) -> None:
        torch.cuda.synchronize(self._index)

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def pinned(self, num_words: int) -> Tensor:
        return torch.empty(num_words, dtype=torch.int64, pin_memory=True)

    def event(self) -> Event:
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def graph(self) -> StepGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            # Not torch's own for captures: what is kept for that stream goes with the first graph that dies.
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return _CudaGraph(self._pool, self._stream)


class _CudaGraph:
    def __init__(self, pool: Any, stream: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool
        self._stream = stream

    def capture(self, work: Callable[[], None]) -> None:
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream):
                work()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not _RECOVERS_FROM_CAPTURE:
                raise BackendError(f"decode steps cannot be captured, set CUDA_GRAPHS=0: {error}") from error
            raise
        finally:
            torch.cuda.set_stream(before)

    def replay(self) -> None:
        self._graph.replay()
