"""Is the fast attention right on this device, and do a row's bits depend on that row alone?

Compared with the plain attention over made-up queries and keys, without a model.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from adapters.torch_backend.model.flash_attention import (
    AttentionOp,
    KeySpans,
    covers,
    decode_spans,
    plain_attention,
)

logger = logging.getLogger(__name__)

_MAX_LEN = 1024
_SLOTS = (5, 0, 3, 1, 4, 2)
_LENGTHS = (1, 1024, 63, 700, 129, 512)
_TOLERANCE = 3e-2
"""Relative error of one head of one row; with weights rounded to bf16 on a CPU the worst was 0.005."""

_MANY = 250
"""Rows that only pad a large batch."""

Case = tuple[Tensor, KeySpans]


class _Probe:
    """Made-up keys and values of six slots, and queries for them."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

        self.k, self.v = (noise(len(_SLOTS) * _MAX_LEN, kv_heads, head_dim) for _ in range(2))
        # Cut from wider rows, as the queries of a model with joined projections are.
        self._wide = noise(512, heads + 2 * kv_heads, head_dim)
        self._heads = heads
        self.device = device
        self.scaling = head_dim**-0.5

    def run(self, op: AttentionOp, case: Case, window: int) -> Tensor:
        q, spans = case
        return op(q, self.k, self.v, spans, _MAX_LEN, self.scaling, window)

    def decode(self, *entries: int, max_rows: int = 1) -> Case:
        """One row for each of these entries."""
        slots, lengths = (
            torch.tensor([t[e] for e in entries], device=self.device) for t in (_SLOTS, _LENGTHS)
        )
        spans = decode_spans(slots, lengths - 1, _MAX_LEN, max_rows=max_rows)
        return self._wide[list(entries)][:, : self._heads], spans

    def mixed(self, rows: tuple[int, ...]) -> Case:
        """The first entries with so many rows each."""
        starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
        firsts = [slot * _MAX_LEN for slot in _SLOTS[: len(rows)]]
        row_starts, key_starts, lengths = (
            torch.tensor(values, dtype=torch.int32, device=self.device)
            for values in (starts, [*firsts, 0], list(_LENGTHS[: len(rows)]))
        )
        return self._wide[: starts[-1], : self._heads], KeySpans(row_starts, key_starts, lengths, max(rows))


def attention_error(
    op: AttentionOp,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int = 0,
    *,
    decodes_alone: bool = False,
) -> float:
    """The largest relative error over decode rows alone and chunks among decode rows; not a number counts.

    With `decodes_alone`, `op` knows no chunks.
    """
    probe = _Probe(heads, kv_heads, head_dim, dtype, device)
    cases = [
        probe.decode(*range(6)),
        probe.decode(3),
        probe.decode(*range(6), *[0] * _MANY),  # a large batch, most of it rows that pad
    ]
    if not decodes_alone:
        cases += [
            probe.decode(*range(6), max_rows=2),
            probe.mixed((1, 64, 7, 128, 1, 200)),
            probe.mixed((1, 1, 63)),
        ]
    worst = 0.0
    for case in cases:
        for width in {0, window}:
            want = probe.run(plain_attention, case, width).float()
            got = probe.run(op, case, width).float()
            # For each row and head alone: those with many keys are small and would drown in a common mean.
            error = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
            worst = max(worst, error if error == error else torch.inf)
    return worst


def decode_keeps_bits(
    op: AttentionOp,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_rows: int = 1,
) -> bool:
    """True where a decode row has the same bits alone, among a few, and among many."""
    probe = _Probe(heads, kv_heads, head_dim, dtype, device)
    few, many = (
        probe.run(op, probe.decode(*range(6), *[0] * more, max_rows=max_rows), 0) for more in (0, _MANY)
    )
    alone = [probe.run(op, probe.decode(entry, max_rows=max_rows), 0)[0] for entry in range(6)]
    return all(torch.equal(row, few[i]) and torch.equal(row, many[i]) for i, row in enumerate(alone))


def attention_keeps_bits(
    op: AttentionOp, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """True where a row has the same bits alone, among others, and as the end of a longer chunk."""
    if not decode_keeps_bits(op, heads, kv_heads, head_dim, dtype, device, max_rows=2):
        return False
    probe = _Probe(heads, kv_heads, head_dim, dtype, device)
    chunk, spans = probe.mixed((1, 130))
    whole = probe.run(op, (chunk, spans), 0)
    row_starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    last = KeySpans(row_starts, spans.key_starts[1:], spans.lengths[1:], max_rows=2)
    middle = replace(last, lengths=last.lengths - 65)
    return all(
        torch.equal(probe.run(op, (chunk[row : row + 1], part), 0)[0], whole[row])
        for row, part in ((130, last), (65, middle))
    )


def usable_attention(
    op: AttentionOp,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int = 0,
) -> AttentionOp | None:
    """`op` if it takes these heads and is right on this device; else None, and a warning unless dtype or
    head size alone rule it out."""
    if not covers(dtype, head_dim, head_dim):
        logger.info("%s heads of %d numbers: attention goes through torch's general path", dtype, head_dim)
        return None
    try:
        error = attention_error(op, heads, kv_heads, head_dim, dtype, device, window)
    except torch.AcceleratorError:
        raise  # the device is lost
    except (RuntimeError, TypeError) as problem:
        logger.warning("no fast attention here, the general path instead: %s", problem)
        return None
    if error <= _TOLERANCE:
        return op
    logger.warning(
        "the fast attention is WRONG here: off by %.1e from the plain one (at most %.0e is rounding); "
        "the general path is taken instead",
        error,
        _TOLERANCE,
    )
    return None
