"""Attention of one mixed step over the slot cache, with the same bits for a row whatever the batch.

What enters are the new queries, keys and values of packed rows `(T, heads, head_dim)`; they are written to
the cache and attended in place. Decode rows of neighbouring slots run as one batch, prompt chunks
one by one, grouped query heads as extra query rows of their key head. How far a row is padded depends on
its own length only, unless padding was measured to be neutral. Knows no model; `register` gives the Hugging
Face models access to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.base import UnsupportedModel
from adapters.torch_backend.kv_cache import SlotCache

BLOCK = 64
"""Lengths are padded to multiples of this."""
IMPLEMENTATION = "lab_slots"
_CALL_COST = 4 * BLOCK
"""What one more attention call costs, in key places read (about 25 us at 1 KiB a place)."""


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Rows `row .. row + count - 1`, one token each, of the slots `slot .. slot + count - 1`."""

    row: int
    count: int
    slot: int
    padded_len: int


@dataclass(frozen=True, slots=True)
class PromptBlock:
    """Rows `row .. row + count - 1`, consecutive positions from `start` on, of one slot."""

    row: int
    count: int
    slot: int
    padded_len: int


@dataclass(slots=True)
class StepLayout:
    """Where each row of a step reads and writes. Built once a step, used by every layer."""

    cache: SlotCache
    slots: Tensor
    positions: Tensor
    decode_runs: list[DecodeRun]
    prompt_blocks: list[PromptBlock]
    num_used_rows: int
    _place_index: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int, torch.dtype], Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None = None
    ) -> Tensor:
        """Store `k` and `v (T, kv_heads, D)`; return the attention of `q (T, heads, D)` in its shape."""
        k_cache, v_cache = self.cache.layer(layer, k, v)
        kv_heads = k.shape[1]
        if kv_heads not in self._place_index:
            self._place_index[kv_heads] = self.cache.place_index(self.slots, self.positions, kv_heads)
        SlotCache.write(k_cache, self._place_index[kv_heads], k)
        SlotCache.write(v_cache, self._place_index[kv_heads], v)

        heads, v_dim = q.shape[1], v.shape[2]
        repeat = heads // kv_heads
        q = q.reshape(-1, kv_heads, repeat, q.shape[2])
        parts: list[Tensor] = []
        for run in self.decode_runs:
            end, span = run.slot + run.count, run.padded_len
            part = F.scaled_dot_product_attention(
                q[run.row : run.row + run.count],
                k_cache[run.slot : end, :, :span],
                v_cache[run.slot : end, :, :span],
                attn_mask=self._decode_mask(run, repeat, window or 0, q),
                scale=scaling,
            )
            parts.append(part.reshape(run.count, heads, v_dim))
        for block in self.prompt_blocks:
            slot, span, count = block.slot, block.padded_len, block.count
            rows = (
                q[block.row : block.row + count].permute(1, 2, 0, 3).reshape(1, kv_heads, repeat * count, -1)
            )
            part = F.scaled_dot_product_attention(
                rows,
                k_cache[slot : slot + 1, :, :span],
                v_cache[slot : slot + 1, :, :span],
                attn_mask=self._block_mask(block, repeat, window or 0, q),
                scale=scaling,
            )
            part = part.view(kv_heads, repeat, count, v_dim).permute(2, 0, 1, 3)
            parts.append(part.reshape(count, heads, v_dim))
        num_padding = len(self.slots) - self.num_used_rows
        if num_padding:
            parts.append(q.new_zeros(num_padding, heads, v_dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_mask(self, run: DecodeRun, repeat: int, window: int, like: Tensor) -> Tensor:
        """Additive mask `(count, 1, repeat, padded_len)`."""
        key = (run.row, repeat, window, like.dtype)
        if key not in self._masks:
            last = self.positions[run.row : run.row + run.count, None]
            mask = _additive_mask(last, run.padded_len, window, like)
            self._masks[key] = mask[:, None, None, :].expand(-1, 1, repeat, -1)
        return self._masks[key]

    def _block_mask(self, block: PromptBlock, repeat: int, window: int, like: Tensor) -> Tensor:
        """Additive mask `(1, 1, repeat * count, padded_len)`."""
        key = (block.row, repeat, window, like.dtype)
        if key not in self._masks:
            last = self.positions[block.row : block.row + block.count, None]
            mask = _additive_mask(last, block.padded_len, window, like)
            self._masks[key] = mask.repeat(repeat, 1)[None, None]
        return self._masks[key]


def _additive_mask(last: Tensor, span: int, window: int, like: Tensor) -> Tensor:
    """0 where a key may be seen, -inf elsewhere; `last (n, 1)` is each row's own position."""
    keys = torch.arange(span, device=last.device)
    hidden = keys > last
    if window:
        hidden |= keys <= last - window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)


def own_padded_len(length: int) -> int:
    """The padded length that depends on a row's own length: multiples of 64, then powers of two from 256."""
    if length <= 4 * BLOCK:
        return -(-length // BLOCK) * BLOCK
    return 1 << (length - 1).bit_length()


def decode_runs(slots: Seq[int], positions: Seq[int], *, tight: bool) -> list[DecodeRun]:
    """Join decode rows, sorted by slot, into batches of neighbouring slots.

    With `tight` (padding was measured to be neutral) a row joins while the padding that this costs is
    cheaper than another call; without, only rows of the same own padded length share a batch.
    """
    runs: list[DecodeRun] = []
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        span = -(-(position + 1) // BLOCK) * BLOCK if tight else own_padded_len(position + 1)
        if runs and slot == runs[-1].slot + runs[-1].count:
            last = runs[-1]
            joint = max(span, last.padded_len)
            padding = joint * (last.count + 1) - last.padded_len * last.count - span
            if padding <= (_CALL_COST if tight else 0):
                runs[-1] = DecodeRun(last.row, last.count + 1, last.slot, joint)
                continue
        runs.append(DecodeRun(row, 1, slot, span))
    return runs


def prompt_blocks(row: int, slot: int, start: int, count: int, size: int) -> list[PromptBlock]:
    """Cut a prompt chunk at multiples of `size`: a position is always computed in the same company."""
    blocks: list[PromptBlock] = []
    position, end = start, start + count
    while position < end:
        stop = min(end, (position // size + 1) * size)
        span = -(-stop // BLOCK) * BLOCK
        blocks.append(PromptBlock(row + position - start, stop - position, slot, span))
        position = stop
    return blocks


def padding_is_neutral(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Measure on the CPU whether longer padding and batch mates leave a decode row's bits alone."""
    generator = torch.Generator().manual_seed(0)
    longest = 24 * BLOCK
    shape = (4, kv_heads, longest, head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(4, kv_heads, heads // kv_heads, head_dim, generator=generator).to(dtype)

    def rows(num_rows: int, length: int, span: int) -> Tensor:
        mask = _additive_mask(torch.full((num_rows, 1), length - 1), span, 0, q)[:, None, None]
        mask = mask.expand(-1, 1, q.shape[2], -1)
        kv = (k[:num_rows, :, :span], v[:num_rows, :, :span])
        return F.scaled_dot_product_attention(q[:num_rows], *kv, attn_mask=mask)

    for length in (3, 64, 100, 200, 282, 317, 450, 512, 700, 906, 1300):
        own = -(-length // BLOCK) * BLOCK
        want = rows(1, length, own)[0]
        spans = {own, own + BLOCK, own + 3 * BLOCK, longest}
        if any(not torch.equal(rows(n, length, span)[0], want) for n in (1, 4) for span in spans):
            return False
    return True


def _attention_of_packed_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    lab_layout: StepLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: `(1, heads, T, D)` in, `(1, T, heads, D)` out."""
    if lab_layout is None:
        raise UnsupportedModel(f"{type(module).__name__} does not pass extra arguments on to its attention")
    if softcap is not None or s_aux is not None:
        what = "soft-capped scores" if softcap is not None else "attention sinks"
        raise UnsupportedModel(f"{type(module).__name__} uses {what}, which the batched attention cannot do")
    layer = module.layer_idx
    assert isinstance(layer, int)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = q.shape[2] ** -0.5 if scaling is None else scaling
    return lab_layout.attend(layer, q, k, v, scale, sliding_window)[None], None


def register() -> None:
    """Make the attention known to transformers under `IMPLEMENTATION`; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_of_packed_rows)
