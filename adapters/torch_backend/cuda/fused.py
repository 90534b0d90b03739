"""The Triton kernels as functions over torch tensors, and the check that they are right on this device.

They compute what `LlamaForward` otherwise puts together from torch's operators, which stay the checked way
back: a kernel that does not compile or that is wrong here costs speed, not answers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.torch_backend.cuda.flash_check import attention_error, decode_keeps_bits
from adapters.torch_backend.model.flash_attention import KeySpans, covers_heads
from adapters.torch_backend.model.llama_forward import DecodeAttention, FusedOps
from adapters.torch_backend.model.llama_shape import LlamaShape

logger = logging.getLogger(__name__)

PART = 256
"""Keys that one program of `attend_part` reads: fixed, so that a row's sums do not depend on its batch."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK, _STAGES = 32, 3
"""With two warps the fastest of 14 choices on an H200 for 64 and 256 rows (docs/performance.md)."""
_PROGRAMS = 4096
_SCRATCH_BYTES = 512 << 20
"""What the sums of all parts take at most: where long slots would need more, rows are attended in turns."""
_HEADS = 8
"""Heads that one program rotates or joins."""
_SILU_BLOCK = 1024
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class TritonOps:
    """`FusedOps` by `triton_kernels`; the module is an argument, so that tests can interpret it."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_rows, size = x.shape
        out = torch.empty_like(x)
        wide = power_of_two(size)
        self._kernels.rms_norm[(num_rows,)](x, weight, out, eps, size, wide, num_warps=_warps(wide))
        return out

    def rotate_and_store(
        self,
        qkv: Tensor,
        table: tuple[Tensor, Tensor],
        slots: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        num_rows, all_heads, dim = qkv.shape
        _, max_len, kv_heads, _ = k_cache.shape
        heads, half = all_heads - 2 * kv_heads, power_of_two(dim // 2)
        self._kernels.rotate_and_store[(num_rows, -(-all_heads // _HEADS))](
            qkv, *table, slots, positions, k_cache, v_cache, max_len, heads, kv_heads, dim, half, _HEADS
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: KeySpans,
        max_len: int,
        scaling: float,
        window: int,
        out: Tensor | None = None,
    ) -> Tensor:
        (num_rows, heads, dim), kv_heads = q.shape, k.shape[1]
        if q.stride()[1:] != (dim, 1):
            q = q.contiguous()
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # A product on a GPU has 16 rows and sums of 16 numbers at least.
        parts = -(-max_len // PART)
        wide, group = (max(16, power_of_two(number)) for number in (dim, heads // kv_heads))
        # By 16, so that each turn's numbers begin where those of a whole launch would be aligned.
        turn = max(16, _SCRATCH_BYTES // (heads * parts * (dim + 2) * 4) // 16 * 16)
        if num_rows > turn:
            for first in range(0, num_rows, turn):
                rows = slice(first, first + turn)
                starts, lengths = spans.key_starts[rows], spans.lengths[rows]
                part = KeySpans(spans.row_starts, starts, lengths, spans.max_rows)
                self.attend(q[rows], k, v, part, max_len, scaling, window, out[rows])
            return out
        sums = q.new_empty(num_rows, heads, parts, dim, dtype=torch.float32)
        stats = q.new_empty(num_rows, heads, parts, 2, dtype=torch.float32)
        cut = parts, PART
        # Where rows alone keep the device busy, programs that find no keys would be most of the work.
        programs = min(parts, max(2, _PROGRAMS // (num_rows * kv_heads)))
        self._kernels.attend_part[(num_rows, kv_heads, programs)](
            q, k, v, spans.key_starts, spans.lengths, sums, stats, scaling, q.stride(0),
            heads, kv_heads, dim, wide, group, *cut, _BLOCK, window,
            num_warps=attend_warps(group, wide), num_stages=_STAGES,
        )  # fmt: skip
        self._kernels.join_parts[(num_rows, -(-heads // _HEADS))](
            sums, stats, spans.lengths, out, heads, dim, wide, _HEADS, *cut, window, num_warps=2
        )
        return out

    def gated(self, x: Tensor) -> Tensor:
        num_rows, size = x.shape[0], x.shape[1] // 2
        out = x.new_empty(num_rows, size)
        self._kernels.silu_times[(num_rows, -(-size // _SILU_BLOCK))](x, out, size, _SILU_BLOCK)
        return out


def power_of_two(number: int) -> int:
    """The smallest one that is not below `number`."""
    return 1 << (number - 1).bit_length()


def attend_warps(group: int, wide: int) -> int:
    """Warps whose registers hold the `group` times `wide` sums of `attend_part`."""
    return min(8, max(2, group * wide // 1024))


def _warps(width: int) -> int:
    """Warps that read `width` numbers at up to eight a thread."""
    return min(8, max(1, width // 256))


def triton_ops() -> TritonOps | None:
    """None where this torch comes without Triton."""
    try:
        from adapters.torch_backend.cuda import triton_kernels
    except ImportError as error:
        logger.info("no Triton, so torch's own operators: %s", error)
        return None
    return TritonOps(triton_kernels)


def usable_ops(
    ops: FusedOps | None, shape: LlamaShape, dtype: torch.dtype, device: torch.device
) -> FusedOps | None:
    """`ops` if all but the attention are right on this device; else None, and a warning if one is wrong."""
    if ops is None or dtype not in DTYPES or shape.head_dim % 2:
        return None
    return ops if _is_right(lambda: _small_errors(ops, shape, dtype, device), dtype) else None


def usable_decode_attention(
    ops: FusedOps | None,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    window: int = 0,
) -> DecodeAttention | None:
    """The attention of `ops` if it is right and keeps a row's bits in any batch; else as `usable_ops`."""
    if ops is None or dtype not in DTYPES or not covers_heads(shape[2], shape[2]):
        return None

    def errors() -> dict[str, float]:
        keeps_bits = decode_keeps_bits(ops.attend, *shape, dtype, device)
        return {
            "attention": attention_error(ops.attend, *shape, dtype, device, window, decodes_alone=True),
            "attention in another batch": 0.0 if keeps_bits else math.inf,
        }

    return ops.attend if _is_right(errors, dtype) else None


def _is_right(errors: Callable[[], dict[str, float]], dtype: torch.dtype) -> bool:
    try:
        found = errors()
    except torch.AcceleratorError:
        raise  # the device is lost
    except Exception as problem:  # Triton's compiler has errors of many kinds
        logger.warning("no Triton kernels here, torch's own operators instead: %s", problem)
        return False
    limit = _TOLERANCE[dtype]
    wrong = [f"{name} is off by {error:.1e}" for name, error in found.items() if not error <= limit]
    if wrong:
        logger.warning("Triton kernels are WRONG here, torch's own operators instead: %s", "; ".join(wrong))
    return not wrong


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x (T, heads, D)` by `cos` and `sin (T, D / 2)`."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _small_errors(
    ops: FusedOps, shape: LlamaShape, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    heads, kv_heads, dim, hidden = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.hidden_size
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device=device, dtype=dtype)

    def error(got: Tensor, want: Tensor) -> float:
        return float((got.float() - want.float()).norm() / want.float().norm())

    num_rows, max_len = 5, 64
    x, weight, gates = noise(num_rows, hidden), noise(hidden), noise(num_rows, 2 * shape.inner_size)
    gate, up = gates.float().chunk(2, dim=-1)
    qkv = noise(num_rows, heads + 2 * kv_heads, dim)
    before = qkv.clone()
    caches = [torch.zeros(7, max_len, kv_heads, dim, dtype=dtype, device=device) for _ in range(2)]
    angles = torch.rand(max_len, dim // 2, generator=generator).to(device) * 6
    slots, positions = (
        torch.tensor(numbers, device=device) for numbers in ([4, 0, 6, 1, 4], [0, 63, 5, 17, 30])
    )
    ops.rotate_and_store(qkv, (angles.cos(), angles.sin()), slots, positions, caches[0], caches[1])
    turned = rotated(before[:, : heads + kv_heads].float(), angles.cos()[positions], angles.sin()[positions])
    expected = [torch.zeros_like(cache, dtype=torch.float32) for cache in caches]
    expected[0][slots, positions] = turned[:, heads:]
    expected[1][slots, positions] = before[:, heads + kv_heads :].float()
    return {
        "norm": error(ops.norm(x, weight, 1e-5), F.rms_norm(x.float(), (hidden,), weight.float(), 1e-5)),
        "rotated queries": error(qkv[:, :heads], turned[:, :heads]),
        "stored keys": error(caches[0], expected[0]),
        "stored values": error(caches[1], expected[1]),
        "silu": error(ops.gated(gates), F.silu(gate) * up),
    }
