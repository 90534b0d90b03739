"""Keys and values of every running sequence, which has a slot: its row in the tables of blocks.

A block is `KV_BLOCK` positions in a row, each with all its heads side by side. What a decode row reads is
then one stream, which a CPU core reads twice as fast as one short piece a head. At first the blocks of a slot
lie in a row, so that torch's operators read a slot as a view. Sequences that come with `block_ids` have
theirs anywhere: the compiled kernels then read them where they are, torch's operators from a copy. On an
accelerator the blocks of a slot always lie in a row.

Layers are allocated when their first keys arrive, so the cache needs to know no model.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from adapters.base import KV_BLOCK, BackendError
from adapters.lazy_memory import lazy_zeros


class SlotAllocator:
    """Hands out the lowest free slot, so that the slots in use stay close together."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))
        self._slot_of: dict[int, int] = {}

    def slot_for(self, seq_id: int, start: int) -> int:
        """The slot of a sequence; a sequence that starts at position 0 gets one if it has none.

        Raises:
            BackendError: no slot is free, or the sequence never began.
        """
        slot = self._slot_of.get(seq_id)
        if slot is not None:
            return slot
        if start:
            raise BackendError(f"sequence {seq_id} continues at position {start} but holds no cache slot")
        if not self._free:
            raise BackendError(f"all {self.num_slots} cache slots are taken: release a sequence first")
        self._slot_of[seq_id] = slot = heapq.heappop(self._free)
        return slot

    def release(self, seq_id: int) -> None:
        slot = self._slot_of.pop(seq_id, None)
        if slot is not None:
            heapq.heappush(self._free, slot)


class SlotCache:
    """Key and value tensors `(num_slots + 1, max_len, heads, head_dim)` for each layer.

    The last slot is scratch: the rows that only pad a step write there.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots + 1
        self.scratch_slot = num_slots
        self.max_len = max_len
        width = max_len // KV_BLOCK
        self._tables = np.arange(self.num_slots * width, dtype=np.int64).reshape(self.num_slots, width)
        self.tables = torch.from_numpy(self._tables)
        """The blocks of each slot `(num_slots, max_len / KV_BLOCK)`, on the CPU. Past a sequence's end they
        are any blocks."""
        self._in_a_row = True
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def place(self, slot: int, block_ids: Seq[int]) -> None:
        """The sequence in `slot` has these blocks; none: those of the slot itself, in a row."""
        if block_ids:
            self._tables[slot, : len(block_ids)] = block_ids
            self._in_a_row = False
        elif not self._in_a_row:
            width = self._tables.shape[1]
            self._tables[slot] = range(slot * width, (slot + 1) * width)

    def slots_of(self, cache: Tensor, slot: int, end: int, length: int) -> Tensor:
        """The first positions of the slots `slot .. end - 1` of a layer: `(slots, length, heads, dim)`."""
        if self._in_a_row:
            return cache[slot:end, :length]
        blocks = self.tables[slot:end, : -(-length // KV_BLOCK)]
        return cache.view(-1, KV_BLOCK, *cache.shape[2:])[blocks].flatten(1, 2)[:, :length]

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors of a layer; made on first use in the shape, dtype and device of `k` and `v`."""
        if index not in self._layers:
            self._layers[index] = self._make(k), self._make(v)
        return self._layers[index]

    def pair(self, index: int) -> tuple[Tensor, Tensor] | None:
        """The tensors of a layer, if it has any yet."""
        return self._layers.get(index)

    @property
    def bytes_per_position(self) -> int:
        """What one token takes in all the layers that were made."""
        tensors = [tensor for pair in self._layers.values() for tensor in pair]
        return sum(t[0, 0].numel() * t.element_size() for t in tensors)

    def resized(self, num_slots: int, max_len: int) -> SlotCache:
        """An empty cache of another size with the same layers, which all are made now."""
        other = SlotCache(num_slots, max_len)
        for index, (k, v) in self._layers.items():
            other.layer(index, k[0], v[0])
        return other

    def _make(self, like: Tensor) -> Tensor:
        _, heads, head_dim = like.shape
        shape = (self.num_slots, self.max_len, heads, head_dim)
        # Zeros, not empty: a masked position is multiplied by 0, and 0 * NaN would be NaN.
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        num_bytes = math.prod(shape) * like.element_size()
        return torch.from_numpy(lazy_zeros(num_bytes)).view(like.dtype).view(shape)

    def kv_positions(self, slots: Tensor, positions: Tensor) -> Tensor:
        """KV positions `(T,)`, counted through all blocks, of the tokens at `positions` in `slots (T,)`."""
        if self._in_a_row:
            return slots * self.max_len + positions
        return self.tables[slots, positions // KV_BLOCK] * KV_BLOCK + positions % KV_BLOCK

    @staticmethod
    def write(cache: Tensor, kv_positions: Tensor, new: Tensor) -> None:
        """Store `new (T, heads, head_dim)` at these positions; `cache` is changed."""
        cache.flatten(0, 1).index_copy_(0, kv_positions, new)
