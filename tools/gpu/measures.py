"""What a machine can do, and how long steps of a loaded backend take on it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from adapters.base import Backend, SamplingParams, ScheduledChunk, Sequence
from adapters.torch_backend.cuda.step_buffers import StepBuffer
from adapters.torch_backend.model.linear import KernelLinear, TiledLinear

_IN_FLIGHT = 2
_UPLOAD = StepBuffer.upload
_PREFILL_TOKENS = 2048


class TorchModel(Backend, Protocol):
    """A torch backend of any device; its weights are there to be counted."""

    @property
    def module(self) -> torch.nn.Module: ...


def wait(device: str) -> None:
    """Until the device has nothing left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def seconds_per_call(device: str, call: Callable[[], Any], repeats: int) -> float:
    """Mean of `repeats` calls in a row, after two that do not count."""
    call()
    call()
    wait(device)
    started_s = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return (time.perf_counter() - started_s) / repeats


def memory_bandwidth(device: str, num_bytes: int, repeats: int = 10) -> float:
    """Bytes a second of a large copy, what it reads and what it writes counted."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_per_call(device, lambda: target.copy_(source), repeats)


def matrix_rate(device: str, size: int, dtype: torch.dtype, repeats: int = 10) -> float:
    """Operations a second of a large product, a multiplication and an addition counted as two."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_per_call(device, lambda: torch.matmul(a, b, out=out), repeats)


def num_multiplied_weights(backend: TorchModel) -> tuple[int, int]:
    """Weights that a row is multiplied with: those of all layers, and those of the output head alone."""
    kinds = (TiledLinear, KernelLinear, torch.nn.Linear)
    layers = list(dict.fromkeys(m for m in backend.module.modules() if isinstance(m, kinds)))
    sizes = [m.in_features * m.out_features for m in layers]
    vocab_size = backend.info.vocab_size
    head = [size for m, size in zip(layers, sizes, strict=True) if m.out_features == vocab_size]
    return sum(sizes) - sum(head), sum(head)


def bytes_per_element(backend: TorchModel) -> int:
    return int(torch.empty(0, dtype=getattr(torch, backend.info.dtype)).element_size())


def decode_step_bytes(backend: TorchModel, num_rows: int, context: int) -> int:
    """What a decode step has to read: all weights, and the keys and values of its rows."""
    kv_bytes = int(backend.info.details["kv_bytes_per_token"])
    return sum(num_multiplied_weights(backend)) * bytes_per_element(backend) + (
        num_rows * (context + 1) * kv_bytes
    )


def run_steps(backend: TorchModel, chunks: list[ScheduledChunk], count: int) -> None:
    """The same step `count` times, with two in flight where the backend overlaps."""
    launch = getattr(backend, "launch", None)
    if launch is None:
        for _ in range(count):
            backend.step(chunks)
        return
    pending: deque[Any] = deque()
    for _ in range(count):
        pending.append(launch(chunks))
        if len(pending) == _IN_FLIGHT:
            pending.popleft().result()
    while pending:
        pending.popleft().result()


def step_s(backend: TorchModel, chunks: list[ScheduledChunk], count: int) -> float:
    """Mean seconds of a step, after three that do not count."""
    run_steps(backend, chunks, 3)
    started_s = time.perf_counter()
    run_steps(backend, chunks, count)
    return (time.perf_counter() - started_s) / count


class DecodeRows:
    """Sequences with `context` tokens behind them, of which any number can be decoded together."""

    def __init__(self, backend: TorchModel, num_rows: int, context: int) -> None:
        self._backend = backend
        self._context = context
        self._sequences = [_sequence(-1 - i, context, backend) for i in range(num_rows)]
        together = max(1, _PREFILL_TOKENS // context)
        for first in range(0, num_rows, together):
            chunks = [ScheduledChunk(seq, 0, context) for seq in self._sequences[first : first + together]]
            given = {output.seq_id: output.token_ids for output in backend.step(chunks)}
            for chunk in chunks:
                chunk.seq.output_token_ids += given[chunk.seq.seq_id]

    def chunks(self, num_rows: int, params: SamplingParams | None = None) -> list[ScheduledChunk]:
        for i, seq in enumerate(self._sequences):
            seq.params = params or SamplingParams(seed=i)
        return [ScheduledChunk(seq, self._context, 1) for seq in self._sequences[:num_rows]]

    def release(self) -> None:
        self._backend.release([seq.seq_id for seq in self._sequences])


def prefill_step_s(backend: TorchModel, num_tokens: int, count: int) -> float:
    """Seconds of a step that computes one prompt of `num_tokens` tokens and nothing else."""
    seq = _sequence(-1, num_tokens, backend)
    took_s = step_s(backend, [ScheduledChunk(seq, 0, num_tokens)], count)
    backend.release([seq.seq_id])
    return took_s


def _sequence(seq_id: int, num_tokens: int, backend: TorchModel) -> Sequence:
    vocab_size = backend.info.vocab_size
    return Sequence(seq_id, [(7 * seq_id + 13 * j) % vocab_size for j in range(num_tokens)], SamplingParams())


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of the device (on a CPU: an operator) within one step."""

    name: str
    calls: float
    microseconds: float
    """All its calls together."""


def kernels_of_step(
    backend: TorchModel, chunks: list[ScheduledChunk], device: str, count: int = 5
) -> list[Kernel]:
    """The kernels of a step, longest first; means of `count` steps."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.startswith("cuda")
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    run_steps(backend, chunks, 3)
    wait(device)
    with profile(activities=[activity]) as profiler:
        run_steps(backend, chunks, count)
        wait(device)
    kernels = []
    for event in profiler.key_averages():
        if on_gpu and event.device_type.name != "CUDA":
            continue
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append(Kernel(event.key, event.count / count, took / count))
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DeviceTimes:
    """How long the device was at work on the steps of a backend, from an event before each step's first copy
    and one behind its last.

    A step that is computed operator by operator counts as work from its first operator to its last.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._launch = getattr(backend, "launch", None)
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> DeviceTimes:
        if self._launch is not None and torch.cuda.is_available():
            self._backend.launch = self._timed
            StepBuffer.upload = lambda *args, **options: self._upload(*args, **options)  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        self._backend.__dict__.pop("launch", None)
        StepBuffer.upload = _UPLOAD  # type: ignore[method-assign]

    def _timed(self, chunks: Any) -> Any:
        assert self._launch is not None
        step = self._launch(chunks)
        end = _event()
        end.record()
        self._pairs.append((self._begin, end))
        return step

    def _upload(self, *args: Any, **options: Any) -> Any:
        self._begin = _event()
        self._begin.record()
        return _UPLOAD(*args, **options)

    def busy_s(self) -> float | None:
        """None where the device has no such events."""
        if not self._pairs:
            return None
        torch.cuda.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._pairs)) / 1000
