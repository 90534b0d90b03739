"""Attention of one mixed step over the slot cache: a row gets the same bits whatever the batch.

Every choice of a bucket or a kernel depends on the row's own length, never on the batch. Decode rows come
first and are sorted by slot, because neighbouring slots are one view of the cache, attended in one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.torch_backend.cpu.kernels import CpuKernels, KernelStep
from adapters.torch_backend.model.flash_attention import StepAttention
from adapters.torch_backend.model.kv_cache import SlotCache

BLOCK = 64
"""Lengths are padded to multiples of this."""
_CALL_COST = 4 * BLOCK
"""What one more attention call costs, in KV positions read (about 25 us at 1 KiB a position)."""


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
    num_decode_rows: int
    """They come first, sorted by slot; then the prompt blocks; then rows that only pad the step."""
    prompt_blocks: list[PromptBlock]
    num_used_rows: int
    tight: bool = False
    """Padding was measured to be neutral."""
    kernels: CpuKernels | None = None
    """Where there are any, they attend for the decode rows."""
    flash: StepAttention | None = None
    """On a device that has it, it attends for all rows."""
    _runs: list[DecodeRun] | None = None
    _kv_positions: Tensor | None = None
    _masks: dict[tuple[int, int, int, torch.dtype], Tensor] = field(default_factory=dict)
    _steps: dict[tuple[float, ...], KernelStep] = field(default_factory=dict)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None = None
    ) -> Tensor:
        """Store `k` and `v (T, kv_heads, D)`; return the attention of `q (T, heads, D)` in its shape."""
        k_cache, v_cache = self.cache.layer(layer, k, v)
        if self._kv_positions is None:
            self._kv_positions = self.cache.kv_positions(self.slots, self.positions)
        SlotCache.write(k_cache, self._kv_positions, k)
        SlotCache.write(v_cache, self._kv_positions, v)
        # A window that no position of a slot lies outside of hides nothing.
        reach = window if window and window < self.cache.max_len else 0
        return self.attend_stored(q, k_cache, v_cache, scaling, reach)

    def rotate_and_attend(
        self, layer: int, qkv: Tensor, heads: int, scaling: float, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The same for rows `qkv (T, heads + 2 kv_heads, D)` that are not rotated yet; needs `kernels`."""
        assert self.kernels is not None
        k_cache, v_cache = self.caches(layer, qkv[:, heads:])
        step = self._kernel_step((heads, *k_cache.shape[2:]), scaling, 0, rotary)
        self.kernels.rotate_and_store(step, qkv, k_cache, v_cache)
        return self.attend_stored(qkv[:, :heads], k_cache, v_cache, scaling, 0)

    def caches(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """The caches of a layer whose keys and values lie side by side in `kv (T, 2 kv_heads, D)`."""
        pair, kv_heads = self.cache.pair(layer), kv.shape[1] // 2
        return pair or self.cache.layer(layer, kv[:, :kv_heads], kv[:, kv_heads:])

    def attend_stored(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float, window: int
    ) -> Tensor:
        """Attention of `q (T, heads, D)` over the cache, in q's shape; padding rows get zeros."""
        if self.flash is not None and self.flash.covers(q, v_cache):
            return self.flash.attend(q, k_cache, v_cache, scaling, window)
        heads, v_dim = q.shape[1], v_cache.shape[3]
        out = q.new_empty(len(q), heads, v_dim)
        if self.num_used_rows < len(q):
            # Padding rows go on through the layers: left as they are, a NaN could be in them.
            out[self.num_used_rows :].zero_()
        if self.num_decode_rows and self._kernels_cover(q, v_cache):
            assert self.kernels is not None
            step = self._kernel_step((heads, *k_cache.shape[2:]), scaling, window)
            self.kernels.attend(step, q, k_cache, v_cache, out)
        else:
            self._attend_runs(q, k_cache, v_cache, scaling, window, out)
        if self.kernels is not None and self.kernels.has_prompts and self._kernels_cover(q, v_cache):
            step = self._kernel_step((heads, *k_cache.shape[2:]), scaling, window)
            for row, count in joined_rows(self.prompt_blocks):
                self.kernels.attend_prompt(step, row, count, q, k_cache, v_cache, out)
            return out
        repeat = heads // k_cache.shape[2]
        for block in self.prompt_blocks:
            rows, end = slice(block.row, block.row + block.count), block.slot + 1
            # Grouped query heads become extra query rows of their key head, whose keys are then read once:
            # (1, kv_heads, repeat * count, D).
            grouped = q[rows].reshape(block.count, -1, repeat, q.shape[2]).permute(1, 2, 0, 3)
            part = F.scaled_dot_product_attention(
                grouped.reshape(1, -1, repeat * block.count, q.shape[2]),
                self.cache.slots_of(k_cache, block.slot, end, block.padded_len).transpose(1, 2),
                self.cache.slots_of(v_cache, block.slot, end, block.padded_len).transpose(1, 2),
                attn_mask=self._block_mask(block, repeat, window, q),
                scale=scaling,
            )
            part = part.view(-1, repeat, block.count, v_dim).permute(2, 0, 1, 3)
            out[rows] = part.reshape(block.count, heads, v_dim)
        return out

    def _attend_runs(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float, window: int, out: Tensor
    ) -> None:
        """The decode rows with torch's attention, run by run, into `out`."""
        repeat = q.shape[1] // k_cache.shape[2]
        if self._runs is None:
            slots, positions = (t[: self.num_decode_rows].tolist() for t in (self.slots, self.positions))
            self._runs = decode_runs(slots, positions, tight=self.tight)
        for run in self._runs:
            rows, end = slice(run.row, run.row + run.count), run.slot + run.count
            part = F.scaled_dot_product_attention(
                q[rows].reshape(run.count, -1, repeat, q.shape[2]),
                self.cache.slots_of(k_cache, run.slot, end, run.padded_len).transpose(1, 2),
                self.cache.slots_of(v_cache, run.slot, end, run.padded_len).transpose(1, 2),
                attn_mask=self._decode_mask(run, repeat, window, q),
                scale=scaling,
            )
            out[rows] = part.flatten(1, 2)

    def _kernels_cover(self, q: Tensor, v_cache: Tensor) -> bool:
        kernels = self.kernels
        return (
            kernels is not None and kernels.dtype == q.dtype and kernels.covers(q.shape[2], v_cache.shape[3])
        )

    def _kernel_step(
        self,
        heads: tuple[int, int, int],
        scaling: float,
        window: int = 0,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> KernelStep:
        """What the kernels want to know, for `heads` query heads, key heads and their dimension."""
        assert self.kernels is not None
        key = (*heads, window, scaling, rotary is not None)
        if key not in self._steps:
            slots, positions = self.slots.tolist(), self.positions.tolist()
            self._steps[key] = self.kernels.step(
                slots, positions, self.num_decode_rows, rotary, heads, self.cache.tables, scaling, window
            )
        return self._steps[key]

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
        # The row's own padded length, from its own position: nothing here may depend on the other rows.
        span = -(-(position + 1) // BLOCK) * BLOCK if tight else own_padded_len(position + 1)
        if runs and slot == runs[-1].slot + runs[-1].count:
            last = runs[-1]
            # KV positions that all rows of the joint call read beyond what they would read apart.
            joint = max(span, last.padded_len)
            padding = joint * (last.count + 1) - last.padded_len * last.count - span
            if padding <= (_CALL_COST if tight else 0):
                runs[-1] = DecodeRun(last.row, last.count + 1, last.slot, joint)
                continue
        runs.append(DecodeRun(row, 1, slot, span))
    return runs


def prompt_blocks(row: int, slot: int, start: int, count: int, size: int) -> list[PromptBlock]:
    """Cut a prompt chunk at multiples of `size`: each position then always has the same rows beside it."""
    blocks: list[PromptBlock] = []
    position, end = start, start + count
    while position < end:
        stop = min(end, (position // size + 1) * size)
        span = -(-stop // BLOCK) * BLOCK
        blocks.append(PromptBlock(row + position - start, stop - position, slot, span))
        position = stop
    return blocks


def joined_rows(blocks: Seq[PromptBlock]) -> list[tuple[int, int]]:
    """First rows and counts for the kernels, whose bits do not depend on how a prompt is cut."""
    joined: list[tuple[int, int]] = []
    slot = -1  # no slot has this number
    for block in blocks:
        if block.slot == slot and joined[-1][1] + block.count <= BLOCK:
            joined[-1] = joined[-1][0], joined[-1][1] + block.count
        else:
            joined.append((block.row, block.count))
        slot = block.slot
    return joined


def padding_is_neutral(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Measure on the CPU whether longer padding and batch mates leave a decode row's bits alone."""
    generator = torch.Generator().manual_seed(0)
    longest = 24 * BLOCK
    shape = (4, longest, kv_heads, head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(4, kv_heads, heads // kv_heads, head_dim, generator=generator).to(dtype)

    def rows(num_rows: int, length: int, span: int) -> Tensor:
        mask = _additive_mask(torch.full((num_rows, 1), length - 1), span, 0, q)[:, None, None]
        mask = mask.expand(-1, 1, q.shape[2], -1)
        keys, values = (t[:num_rows, :span].transpose(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q[:num_rows], keys, values, attn_mask=mask)

    for length in (3, 64, 100, 200, 282, 317, 450, 512, 700, 906, 1300):
        own = -(-length // BLOCK) * BLOCK
        want = rows(1, length, own)[0]
        spans = {own, own + BLOCK, own + 3 * BLOCK, longest}
        if any(not torch.equal(rows(n, length, span)[0], want) for n in (1, 4) for span in spans):
            return False
    return True
