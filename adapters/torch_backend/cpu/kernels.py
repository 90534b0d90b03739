"""The compiled kernels in `src`, called through ctypes.

They are an option, not a requirement. Without a compiler, or for shapes that the kernels do not cover,
`load_kernels` and `covers` say no, and the caller uses torch operators. The structures below mirror those of
the C++ source field by field.
"""

from __future__ import annotations

import ctypes
import logging
import math
import subprocess
from collections.abc import Sequence as Seq
from enum import IntEnum
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.torch_backend.cpu.build import built_library, cpu_capabilities

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_ARENA_BLOCK_BYTES = 64 << 20
"""What is not written takes no memory."""
_HEAD_DIMS = {32, 64, 96, 128}
PANEL = 16
"""Numbers in a vector, and outputs of a linear layer that lie together."""
_INT, _I32, _PTR = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
PARTS = ("norms", "matrix products", "rotation, cache writes", "attention")
"""Of `run_model`; `Part` in the source."""


class Epilogue(IntEnum):
    """What follows a product before its sums are rounded; `Epilogue` in the source."""

    NONE = 0
    SWISH = 1
    PLUS = 2
    TIMES = 3


class KernelStep(ctypes.Structure):
    """What the kernels know of a step and of the shape of a layer's cache; `Step` in the source."""

    _fields_ = (
        *((name, ctypes.POINTER(_INT)) for name in ("slots", "positions")),
        *((name, _PTR) for name in ("tables", "cosines", "sines")),
        *((name, _INT) for name in ("rows", "decode_rows", "heads", "kv_heads", "dim")),
        *((name, _INT) for name in ("table_width", "window")),
        ("scale", ctypes.c_float),
        ("threads", _I32),
    )


class KernelWeight(ctypes.Structure):
    """A linear layer and its packed weight; `Linear` in the source."""

    _fields_ = (
        ("panels", _PTR),
        ("bias", _PTR),
        ("out_features", _INT),
        ("in_features", _INT),
        ("threads", _I32),
    )


class KernelLayer(ctypes.Structure):
    """A layer of Llama's shape and its cache; `Layer` in the source."""

    _fields_ = (
        *((name, _PTR) for name in ("input_norm", "mlp_norm", "keys", "values")),
        *((name, KernelWeight) for name in ("qkv", "out", "gate", "up", "down")),
    )


class KernelModel(ctypes.Structure):
    """A model of Llama's shape; `Model` in the source."""

    _fields_ = (
        ("embedding", _PTR),
        ("norm", _PTR),
        ("head", KernelWeight),
        ("layers", ctypes.POINTER(KernelLayer)),
        ("num_layers", _INT),
        ("vocab_size", _INT),
        ("eps", ctypes.c_float),
    )


class KernelRows(ctypes.Structure):
    """Inputs and outputs of a step beside the cache; `Rows` in the source."""

    _fields_ = (
        *((name, ctypes.POINTER(_INT)) for name in ("ids", "prompts", "logit_rows", "likeliest")),
        ("logits", _PTR),
        ("num_prompts", _INT),
        ("num_logits", _INT),
    )


class _Arena:
    """Room for weights, end to end: large enough blocks get huge pages (from NumPy, which asks the system for
    them), and a core then reads them some 8% faster than from pages of 4 KiB."""

    def __init__(self) -> None:
        self._block = np.empty(0, dtype=np.uint8)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes + _ALIGNMENT > len(self._block):
            self._block = np.empty(max(num_bytes + _ALIGNMENT, _ARENA_BLOCK_BYTES), dtype=np.uint8)
        begin = -self._block.ctypes.data % _ALIGNMENT
        taken, self._block = self._block[begin : begin + num_bytes], self._block[begin + num_bytes :]
        return torch.from_numpy(taken).view(dtype).view(shape)


class CpuKernels:
    """The kernels for one dtype. All tensors must be contiguous unless a stride is mentioned."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, num_threads: int) -> None:
        self.dtype = dtype
        self.num_threads = num_threads
        self._arena = _Arena()
        name = str(dtype).removeprefix("torch.")
        step, weight = ctypes.POINTER(KernelStep), ctypes.POINTER(KernelWeight)

        def bound(function: str, *argtypes: Any, restype: Any = None) -> Any:
            found = getattr(library, f"lab_{function}")
            found.argtypes, found.restype = argtypes, restype
            return found

        self._norm = bound(f"norm_{name}", _PTR, _PTR, _PTR, _INT, _INT, ctypes.c_float)
        self._argmax = bound(f"argmax_{name}", _PTR, _INT, _INT, _PTR)
        self._rotate_and_store = bound(f"rotate_and_store_{name}", step, _PTR, _PTR, _PTR)
        where = _PTR, _INT, _INT, _PTR, _PTR, _PTR
        self._attend = bound(f"attend_{name}", step, *where, restype=ctypes.c_int)
        is_bf16 = dtype is torch.bfloat16
        # A CPU with a matrix unit (AMX) multiplies bf16 several times faster through torch.
        leaves_products = is_bf16 and bool(cpu_capabilities().get("amx_bf16"))
        self.has_linear = hasattr(library, f"lab_linear_{name}") and not leaves_products
        self.has_prompts = self.has_linear and is_bf16
        if self.has_linear:
            self._linear = bound(f"linear_{name}", weight, _PTR, _INT, _PTR, _PTR, _I32)
        if self.has_prompts:
            prompt_rows = step, _INT, _INT
            self._attend_prompt = bound("attend_prompt_bfloat16", *prompt_rows, *where, restype=ctypes.c_int)
            model, rows = ctypes.POINTER(KernelModel), ctypes.POINTER(KernelRows)
            self._run_model = bound("model_bfloat16", step, model, rows, _PTR)
        self._part_seconds: ctypes.Array[ctypes.c_double] | None = None

    def described(self) -> str:
        """Which parts of a step the kernels can take over on this CPU."""
        return "norms, rotation, attention" + (", linear layers" if self.has_linear else "")

    @staticmethod
    def covers(head_dim: int, v_dim: int | None = None, hidden_size: int = PANEL) -> bool:
        """True where attention of such heads and norms of such rows can run here."""
        return head_dim in _HEAD_DIMS and v_dim in (None, head_dim) and hidden_size % PANEL == 0

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of `x (T, n)`, computed in fp32 and rounded once."""
        out = torch.empty_like(x)
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out

    def argmax(self, x: Tensor) -> list[int]:
        """The index of the largest number in each row of `x (T, n)`, the first of equals."""
        indexes = torch.empty(len(x), dtype=torch.int64)
        self._argmax(x.data_ptr(), x.shape[0], x.shape[1], indexes.data_ptr())
        found: list[int] = indexes.tolist()
        return found

    def step(
        self,
        slots: Seq[int],
        positions: Seq[int],
        num_decode_rows: int,
        rotary: tuple[Tensor, Tensor] | None,
        heads: tuple[int, int, int],
        tables: Tensor,
        scale: float,
        window: int = 0,
    ) -> KernelStep:
        """What the other kernels want to know of a step, given the slot and the position of each row.

        `rotary` are fp32 cosines and sines `(max_len, dim / 2)`; `heads` are query heads, key heads, dim;
        `tables` are those of a cache. All three tensors must outlive the step.
        """
        cosines, sines = (t.data_ptr() for t in rotary) if rotary else (None, None)
        num_heads, kv_heads, dim = heads
        where = _INT * len(slots)
        return KernelStep(
            where(*slots), where(*positions), tables.data_ptr(), cosines, sines, len(slots), num_decode_rows,
            num_heads, kv_heads, dim, tables.shape[1], window, scale, self.num_threads,
        )  # fmt: skip

    def rotate_and_store(self, step: KernelStep, qkv: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Rotate the queries of `qkv (T, heads + 2 kv_heads, D)` in place; cache rotated keys, and values."""
        self._rotate_and_store(step, qkv.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr())

    def attend(self, step: KernelStep, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> None:
        """Attention of the decode rows `q[:n] (n, heads, D)`, of any row and head stride, into `out[:n]`."""
        caches = k_cache.data_ptr(), v_cache.data_ptr()
        failed = self._attend(step, q.data_ptr(), q.stride(0), q.stride(1), *caches, out.data_ptr())
        assert not failed, "callers ask `covers` first"

    def attend_prompt(
        self,
        step: KernelStep,
        row: int,
        count: int,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
    ) -> None:
        """Attention of `q[row : row + count]`, neighbouring positions of one slot, into `out`; needs
        `has_prompts`. Reads the cache up to the next multiple of 64 positions."""
        where = q.data_ptr(), q.stride(0), q.stride(1)
        caches = k_cache.data_ptr(), v_cache.data_ptr()
        failed = self._attend_prompt(step, row, count, *where, *caches, out.data_ptr())
        assert not failed, "callers ask `covers` first"

    def covers_linear(self, out_features: int, in_features: int) -> bool:
        """True where `linear` can replace a layer with a weight of this shape."""
        return self.has_linear and out_features % PANEL == 0 and in_features % 2 == 0

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """True where the numbers of a weight are numbers of bf16, as those of most checkpoints are: in fp32 a
        product with them is the same, and reads half as much."""
        return weight.dtype is torch.bfloat16 or torch.equal(weight.bfloat16().to(weight.dtype), weight)

    @staticmethod
    def whole_panels(weight: Tensor) -> Tensor:
        """`weight (out, in)` with rows of zeros behind it where `out` is no multiple of `PANEL`."""
        num_missing = -len(weight) % PANEL
        return F.pad(weight, (0, 0, 0, num_missing)) if num_missing else weight

    def pack_weight(self, weight: Tensor) -> Tensor:
        """`(out, in)` as `(panels, in / 2, 16, 2)` in bf16: what `linear` reads is one stream."""
        out_features, in_features = weight.shape
        panels = weight.view(out_features // PANEL, PANEL, in_features // 2, 2).permute(0, 2, 1, 3)
        return self._arena.empty(panels.shape, torch.bfloat16).copy_(panels)

    def weight(self, panels: Tensor, bias: Tensor | None) -> KernelWeight:
        """Describes a packed weight to `linear`; both tensors must outlive it."""
        num_panels, pairs, lanes, _ = panels.shape
        at = None if bias is None else bias.data_ptr()
        return KernelWeight(panels.data_ptr(), at, num_panels * lanes, 2 * pairs, self.num_threads)

    def linear(
        self, weight: KernelWeight, x: Tensor, then: Epilogue = Epilogue.NONE, other: Tensor | None = None
    ) -> Tensor:
        """`x (T, in)` to `(T, out)`; `other (T, out)` is what `then` adds or multiplies with."""
        out = x.new_empty(len(x), weight.out_features)
        operand = None if other is None else other.data_ptr()
        self._linear(weight, x.data_ptr(), len(x), operand, out.data_ptr(), then)
        return out

    def take_part_seconds(self) -> dict[str, float]:
        """What `run_model` spent on each of `PARTS` since the last call; the first begins the account."""
        taken = self._part_seconds or [0.0] * len(PARTS)
        self._part_seconds = (ctypes.c_double * len(PARTS))()
        return dict(zip(PARTS, taken, strict=True))

    def run_model(
        self,
        step: KernelStep,
        model: KernelModel,
        ids: Seq[int],
        prompts: Seq[tuple[int, int]],
        logit_rows: Seq[int],
        logits: Tensor,
    ) -> list[int]:
        """From all token ids to `logits[: len(logit_rows)]`, as wide as the head, and their argmax; needs
        `has_prompts`.

        `prompts` are first rows and numbers of rows: neighbouring positions of one slot.
        """
        likeliest = (_INT * len(logit_rows))()
        rows = KernelRows(
            (_INT * len(ids))(*ids),
            (_INT * (2 * len(prompts)))(*chain.from_iterable(prompts)),
            (_INT * len(logit_rows))(*logit_rows),
            likeliest,
            logits.data_ptr(),
            len(prompts),
            len(logit_rows),
        )
        self._run_model(step, model, rows, self._part_seconds)
        return likeliest[:]


def load_kernels(folder: Path, dtype: torch.dtype, num_threads: int) -> CpuKernels | None:
    """The kernels for `dtype`, compiled into `folder` unless they are there; None where that cannot be."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        return CpuKernels(ctypes.CDLL(str(built_library(folder))), dtype, num_threads)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no compiled CPU kernels, torch operators instead: %s", error)
        return None
