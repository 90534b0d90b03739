"""The compiled kernels of the folder `kernels`: built once with the system's compiler, called through ctypes.

What enters are torch tensors on the CPU, fp32 or bf16; what leaves is written in place or into a new tensor.
An option, not a requirement: without a compiler, or for shapes the kernels do not cover, `load_kernels` and
`covers` say no and the caller uses torch operators. Knows no model.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "kernels"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
_MACHINE_FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-mcpu=native",), ())
"""Tried in turn; the last works everywhere, slower and on one thread."""
_COMPILE_TIMEOUT_S = 120

_HEAD_DIMS = {32, 64, 96, 128}
_LANES = 16
_INT, _I32, _PTR = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
_EPILOGUES = {"none": 0, "swish": 1, "add": 2, "mul": 3}


class KernelStep(ctypes.Structure):
    """What the kernels know of a step and of the shape of a layer's cache; `Step` in the source."""

    _fields_ = (
        *((name, _PTR) for name in ("slots", "positions", "cosines", "sines")),
        *((name, _INT) for name in ("rows", "decode_rows", "heads", "kv_heads", "dim", "max_len", "window")),
        ("scale", ctypes.c_float),
        ("threads", _I32),
    )


class KernelLayer(ctypes.Structure):
    """A linear layer's packed weight; `Linear` in the source."""

    _fields_ = (
        ("panels", _PTR),
        ("bias", _PTR),
        ("out_features", _INT),
        ("in_features", _INT),
        ("threads", _I32),
    )


class CpuKernels:
    """The kernels for one dtype. All tensors must be contiguous unless a stride is mentioned."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, num_threads: int) -> None:
        self.dtype = dtype
        self.num_threads = num_threads
        name = str(dtype).removeprefix("torch.")
        step = ctypes.POINTER(KernelStep)
        self._norm = getattr(library, f"lab_norm_{name}")
        self._norm.argtypes = (_PTR, _PTR, _PTR, _INT, _INT, ctypes.c_float)
        self._norm.restype = None
        self._argmax = getattr(library, f"lab_argmax_{name}")
        self._argmax.argtypes = (_PTR, _INT, _INT, _PTR)
        self._argmax.restype = None
        self._rotate_and_store = getattr(library, f"lab_rotate_and_store_{name}")
        self._rotate_and_store.argtypes = (step, _PTR, _PTR, _PTR)
        self._rotate_and_store.restype = None
        self._attend = getattr(library, f"lab_attend_{name}")
        self._attend.argtypes = (step, _PTR, _INT, _INT, _PTR, _PTR, _PTR)
        self._attend.restype = ctypes.c_int
        self._attend_prompt = library.lab_attend_prompt_bfloat16
        self._attend_prompt.argtypes = (step, _INT, _INT, _PTR, _INT, _INT, _PTR, _PTR, _PTR)
        self._attend_prompt.restype = ctypes.c_int
        # A CPU with a matrix unit (AMX) multiplies several times faster through torch.
        has_matrix_unit = bool(torch.cpu.get_capabilities().get("amx_bf16"))
        self.has_linear = dtype is torch.bfloat16 and bool(library.lab_has_linear()) and not has_matrix_unit
        self._linear = library.lab_linear_bfloat16
        self._linear.argtypes = (ctypes.POINTER(KernelLayer), _PTR, _INT, _PTR, _PTR, _I32)
        self._linear.restype = None

    @staticmethod
    def covers(head_dim: int, v_dim: int | None = None, hidden_size: int = _LANES) -> bool:
        """True where attention of such heads and norms of such rows can run here."""
        return head_dim in _HEAD_DIMS and v_dim in (None, head_dim) and hidden_size % _LANES == 0

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of `x (T, n)`, computed in fp32 and rounded once."""
        out = torch.empty_like(x)
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out

    def argmax(self, x: Tensor) -> list[int]:
        """The place of the largest number in each row of `x (T, n)`, the first of equals."""
        places = torch.empty(len(x), dtype=torch.int64)
        self._argmax(x.data_ptr(), x.shape[0], x.shape[1], places.data_ptr())
        found: list[int] = places.tolist()
        return found

    def step(
        self,
        slots: Tensor,
        positions: Tensor,
        num_decode_rows: int,
        rotary: tuple[Tensor, Tensor] | None,
        heads: tuple[int, int, int],
        max_len: int,
        scale: float,
        window: int = 0,
    ) -> KernelStep:
        """What the other kernels want to know of a step; `slots` and `positions (T,)` must outlive it.

        `rotary` are fp32 cosines and sines `(max_len, dim / 2)`; `heads` are query heads, key heads, dim.
        """
        cosines, sines = (t.data_ptr() for t in rotary) if rotary else (None, None)
        num_heads, kv_heads, dim = heads
        return KernelStep(
            slots.data_ptr(), positions.data_ptr(), cosines, sines,
            len(slots), num_decode_rows, num_heads, kv_heads, dim, max_len, window, scale, self.num_threads,
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
        `has_linear`. Reads the cache up to the next multiple of 64 places."""
        where = q.data_ptr(), q.stride(0), q.stride(1)
        caches = k_cache.data_ptr(), v_cache.data_ptr()
        failed = self._attend_prompt(step, row, count, *where, *caches, out.data_ptr())
        assert not failed, "callers ask `covers` first"

    def covers_linear(self, weight: Tensor) -> bool:
        """True where `linear` can take the place of a layer with this weight `(out, in)`."""
        out_features, in_features = weight.shape
        return self.has_linear and out_features % _LANES == 0 and in_features % 2 == 0

    @staticmethod
    def pack_weight(weight: Tensor) -> Tensor:
        """`(out, in)` as `(panels, in / 2, 16, 2)`: what `linear` reads is one stream."""
        out_features, in_features = weight.shape
        panels = weight.view(out_features // _LANES, _LANES, in_features // 2, 2)
        return panels.permute(0, 2, 1, 3).contiguous()

    def layer(self, panels: Tensor, bias: Tensor | None) -> KernelLayer:
        """Describes a packed weight to `linear`; both tensors must outlive it."""
        num_panels, pairs, lanes, _ = panels.shape
        at = None if bias is None else bias.data_ptr()
        return KernelLayer(panels.data_ptr(), at, num_panels * lanes, 2 * pairs, self.num_threads)

    def linear(self, layer: KernelLayer, x: Tensor, epilogue: str, other: Tensor | None = None) -> Tensor:
        """`x (T, in)` to `(T, out)`; `epilogue` is none, swish, or add or mul with `other (T, out)`."""
        out = x.new_empty(x.shape[0], layer.out_features)
        others = None if other is None else other.data_ptr()
        self._linear(layer, x.data_ptr(), x.shape[0], others, out.data_ptr(), _EPILOGUES[epilogue])
        return out


def load_kernels(folder: Path, dtype: torch.dtype, num_threads: int) -> CpuKernels | None:
    """The kernels for `dtype`, compiled into `folder` unless they are there; None where that cannot be."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        return CpuKernels(ctypes.CDLL(str(_built(folder))), dtype, num_threads)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no compiled CPU kernels, torch operators instead: %s", error)
        return None


def _built(folder: Path) -> Path:
    """The path of the library for this source, compiler and CPU.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or none that takes the source.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler found (looked for {', '.join(_COMPILERS)})")
    cpu = json.dumps(torch.cpu.get_capabilities(), sort_keys=True, default=str)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10).stdout
    made_with = "\0".join([compiler, version, cpu, repr((_FLAGS, _MACHINE_FLAGS))])
    sources = [path.read_bytes() for path in sorted(_SOURCES.iterdir()) if path.is_file()]
    key = hashlib.sha256(b"\0".join([*sources, made_with.encode()])).hexdigest()
    path = folder / f"cpu_kernels-{key[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        for flags in _MACHINE_FLAGS:
            command = [compiler, *_FLAGS, *flags, str(_SOURCES / "kernels.cpp"), "-o", name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
            if done.returncode == 0:
                logger.info("compiled the CPU kernels with %s %s", compiler, " ".join(flags))
                os.replace(name, path)
                return path
        raise OSError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}")
    finally:
        Path(name).unlink(missing_ok=True)
