"""Linear layers whose rows have the same bits whatever the batch, with weights packed once for the CPU.

A matrix library picks its kernel by the number of rows, and kernels differ in the last bit. There are two
ways out. Our own kernel sums in one order for any number of rows. Where it cannot run, the row counts that
agree with one another are measured at start, and only those are used: more rows run in several tiles, and
fewer are padded by the caller, once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.torch_backend.cpu.kernels import CpuKernels, Epilogue

ANCHOR_ROWS = 16
"""The row count whose bits the others must reproduce: a full default batch of decode rows."""

_CANDIDATE_ROWS = (*range(1, 34), 40, 48, 64, 96, 128, 192, 256, 384, 512)
_PROBED_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class RowRange:
    """Row counts `min_rows .. max_rows` give every row the same bits."""

    min_rows: int
    max_rows: int

    def __and__(self, other: RowRange) -> RowRange:
        return RowRange(max(self.min_rows, other.min_rows), min(self.max_rows, other.max_rows))

    def described(self) -> str:
        return "any" if self == ANY_ROWS else f"{self.min_rows}-{self.max_rows}"

    def padded(self, num_rows: int) -> int:
        """The smallest count of at least `num_rows` that splits into tiles which were all probed."""
        full, rest = divmod(num_rows, self.max_rows)
        if rest == 0 or self == ANY_ROWS:
            return num_rows
        tile: int = next(rows for rows in _CANDIDATE_ROWS if rows >= max(rest, self.min_rows))
        return full * self.max_rows + min(tile, self.max_rows)


ANY_ROWS = RowRange(1, 1 << 30)


class TiledLinear(nn.Module):
    """`x @ weight.T + bias` over `(..., in)`, in tiles of at most `max_rows` rows.

    With `packed`, the weight is stored in the blocked layout that oneDNN would otherwise build anew in
    every call, which at 2 to 32 rows takes longer than the product itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, packed: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.packed = packed
        self.max_rows = ANY_ROWS.max_rows
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ANCHOR_ROWS) if packed else weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        return self._tiled(self.product, rows).view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor, activation: str = "none") -> Tensor:
        """One untiled product `(T, in) -> (T, out)`; `activation` is oneDNN's name, "none" or "swish"."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")
            return out
        out = F.linear(x, self.weight, self.bias)
        return F.silu(out) if activation == "swish" else out

    def swish(self, x: Tensor) -> Tensor:
        """`silu(linear(x))` for `(T, in)`."""
        return self._tiled(lambda tile: self.product(tile, "swish"), x)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """`linear(x) + other` for `(T, in)` and `(T, out)`; on a GPU `other` is changed and returned."""
        if other.is_cuda and self.bias is None:
            return self._plus_in_place(x, other)
        return self._with(x, other, "add")

    def _plus_in_place(self, x: Tensor, other: Tensor) -> Tensor:
        """The sum as part of the product: one kernel less to launch."""
        weight = self.weight.t()  # a view: addmm takes (in, out)
        tiles = (torch.split(t, self.max_rows) for t in (x, other))
        for tile, total in zip(*tiles, strict=True):
            total.addmm_(tile, weight)
        return other

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """`linear(x) * other` for `(T, in)` and `(T, out)`."""
        return self._with(x, other, "mul")

    def _with(self, x: Tensor, other: Tensor, op: str) -> Tensor:
        if not self.packed:
            out = self._tiled(self.product, x)
            return out + other if op == "add" else out * other
        fused = torch.ops.mkldnn._linear_pointwise.binary
        return self._tiled(lambda a, b: fused(a, b, self.weight, self.bias, op), x, other)

    def _tiled(self, product: Callable[..., Tensor], *operands: Tensor) -> Tensor:
        if operands[0].shape[0] <= self.max_rows:
            return product(*operands)
        tiles = zip(*(torch.split(operand, self.max_rows) for operand in operands), strict=True)
        return torch.cat([product(*tile) for tile in tiles])


class KernelLinear(nn.Module):
    """The same in the compiled kernels, where every number of rows gives a row the same bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: CpuKernels) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.weight = kernels.pack_weight(weight)
        self.bias = bias
        self.packed = kernels.weight(self.weight, bias)
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        return self._kernels.linear(self.packed, rows).view(*x.shape[:-1], self.out_features)

    def swish(self, x: Tensor) -> Tensor:
        """`silu(linear(x))` for `(T, in)`."""
        return self._kernels.linear(self.packed, x.contiguous(), Epilogue.SWISH)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """`linear(x) + other` for `(T, in)` and `(T, out)`."""
        return self._kernels.linear(self.packed, x.contiguous(), Epilogue.PLUS, other.contiguous())

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """`linear(x) * other` for `(T, in)` and `(T, out)`."""
        return self._kernels.linear(self.packed, x.contiguous(), Epilogue.TIMES, other.contiguous())


Linear = TiledLinear | KernelLinear


def make_linear(weight: Tensor, bias: Tensor | None, *, packed: bool, kernels: CpuKernels | None) -> Linear:
    """The fastest layer there is for this weight; `packed` says whether torch's can be packed."""
    if kernels is not None and kernels.covers_linear(*weight.shape) and kernels.holds(weight):
        return KernelLinear(weight, bias, kernels)
    return TiledLinear(weight, bias, packed=packed)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """True where this build of torch has oneDNN's packed linear layers and they run for `dtype`."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        layer = TiledLinear(torch.eye(32, dtype=dtype), None, packed=True)
        x = torch.ones(2, 32, dtype=dtype)
        return torch.equal(layer.product(x), x) and torch.equal(layer.plus(x, x), x + x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def measure_row_range(layer: TiledLinear) -> RowRange:
    """Find the row counts around `ANCHOR_ROWS` that give the same bits as it does.

    Differences are rare (about one output in 20,000 was seen to change), so at least a quarter of a
    million outputs are compared for each candidate.
    """
    num_rows = min(max(_PROBED_ELEMENTS // layer.out_features, 64), 1024)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows + _CANDIDATE_ROWS[-1], layer.in_features, generator=generator).to(layer.dtype)

    def rows_in_tiles_of(tile: int) -> Tensor:
        return torch.cat([layer.product(x[s : s + tile]) for s in range(0, num_rows, tile)])[:num_rows]

    # The range grows from the anchor both ways and ends at the first count that differs: a count beyond that
    # may agree by chance, and `padded` relies on every count inside the range.
    want = rows_in_tiles_of(ANCHOR_ROWS)
    anchor = _CANDIDATE_ROWS.index(ANCHOR_ROWS)
    low = high = anchor
    while low > 0 and torch.equal(rows_in_tiles_of(_CANDIDATE_ROWS[low - 1]), want):
        low -= 1
    while high + 1 < len(_CANDIDATE_ROWS) and torch.equal(rows_in_tiles_of(_CANDIDATE_ROWS[high + 1]), want):
        high += 1
    return RowRange(_CANDIDATE_ROWS[low], _CANDIDATE_ROWS[high])


def tile_rows(model: nn.Module, num_rows: int) -> None:
    """Let every linear layer of ours compute at most so many rows at a time."""
    for module in model.modules():
        if isinstance(module, TiledLinear):
            module.max_rows = num_rows


def common_row_range(model: nn.Module) -> RowRange:
    """Measure each distinct weight shape, set every layer's tile size, return the range that all share."""
    layers = [module for module in model.modules() if isinstance(module, TiledLinear)]
    shapes = {(layer.out_features, layer.in_features, layer.bias is None): layer for layer in layers}
    common = ANY_ROWS
    for layer in shapes.values():
        common &= measure_row_range(layer)
    for layer in layers:
        layer.max_rows = common.max_rows
    return common
