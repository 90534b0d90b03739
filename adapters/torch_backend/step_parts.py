"""The parts of a step whose time a profiler may take, and the functions that they are made of.

A profiler puts a timed wrapper in the place of each function before the model runs. Where the compiled
kernels compute a whole step in one call, `CpuKernels.take_part_seconds` gives the times of its parts instead.
"""

from __future__ import annotations

from adapters.torch_backend import backend
from adapters.torch_backend.cpu.kernels import CpuKernels
from adapters.torch_backend.model.attention import StepLayout
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.model.linear import KernelLinear, TiledLinear
from adapters.torch_backend.model.llama_forward import LlamaForward
from adapters.torch_backend.packing import StepPacker

_PRODUCTS = ("forward", "plus", "times", "swish")

STEP_PARTS: list[tuple[object, str, str]] = [
    *((kind, name, "matrix products") for kind in (TiledLinear, KernelLinear) for name in _PRODUCTS),
    (StepLayout, "attend_stored", "attention"),
    (CpuKernels, "rotate_and_store", "rotation, cache writes"),
    (SlotCache, "write", "rotation, cache writes"),
    (LlamaForward, "_normed", "norms"),
    *((StepPacker, name, "packing rows") for name in ("plan", "packed")),
    *((backend, name, "sampling") for name in ("choose_tokens", "find_likeliest")),
    (backend.TorchBackend, "step", "other operators"),
]
"""Owner of a function, its name, and the part that its own time counts to."""
