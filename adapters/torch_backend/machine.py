"""The few things that only a CUDA device has: pinned memory, events, graphs, a count of free bytes.

What enters is a device; what leaves are handles. Behind a protocol, so that everything built on them runs in
tests on a CPU with stand-ins. Knows no model and no step. Not verified on a GPU yet.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.torch_backend.flash_attention import LEAST_CAPABILITY, AttentionOp, flash_attention


class Event(Protocol):
    def record(self) -> Any: ...

    def synchronize(self) -> Any: ...


class StepGraph(Protocol):
    """Device work that was written down once and can be done again over the same tensors."""

    def capture(self, work: Callable[[], None]) -> None: ...

    def replay(self) -> None: ...


class Machine(Protocol):
    @property
    def device(self) -> torch.device: ...

    @property
    def attention(self) -> AttentionOp | None:
        """The variable-length attention of this device, if it has one."""
        ...

    def make_current(self) -> None:
        """Events, graphs and kernels of this thread are this device's from now on."""
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
        self.make_current()

    def make_current(self) -> None:
        torch.cuda.set_device(self._index)

    @property
    def attention(self) -> AttentionOp | None:
        return flash_attention if torch.cuda.get_device_capability() >= LEAST_CAPABILITY else None

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
        return _CudaGraph(self._pool)


class _CudaGraph:
    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, work: Callable[[], None]) -> None:
        with torch.cuda.graph(self._graph, pool=self._pool):
            work()

    def replay(self) -> None:
        self._graph.replay()
