"""Keys and values of every running sequence: one slot each, written in place.

What enters are the new keys and values of a step, `(T, heads, head_dim)`; what leaves are views of whole
slots, without a copy. A slot is a contiguous stretch of `max_len` places per head, so neighbouring slots
can be read as one batch. Knows no model: a layer's tensors are made when its first keys arrive.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from torch import Tensor

from adapters.base import BackendError


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
    """Key and value tensors `(num_slots + 1, heads, max_len, head_dim)` for each layer.

    The last slot is scratch: the rows that only pad a step write there.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots + 1
        self.scratch_slot = num_slots
        self.max_len = max_len
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors of a layer; made on first use in the shape, dtype and device of `k` and `v`."""
        pair = self._layers.get(index)
        if pair is None:
            pair = self._make(k), self._make(v)
            self._layers[index] = pair
        return pair

    def _make(self, like: Tensor) -> Tensor:
        _, heads, head_dim = like.shape
        shape = (self.num_slots, heads, self.max_len, head_dim)
        # Zeros, not empty: a masked place is multiplied by 0, and 0 * NaN would be NaN.
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        # NumPy's zeros are mapped on first touch, so a place that is never used costs no memory.
        num_bytes = math.prod(shape) * like.element_size()
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(like.dtype).view(shape)

    def place_index(self, slots: Tensor, positions: Tensor, heads: int) -> Tensor:
        """Flat row numbers `(T * heads,)` of tokens at `positions` in `slots`, both `(T,)`."""
        first = slots * (heads * self.max_len) + positions
        head_offset = torch.arange(heads, device=slots.device) * self.max_len
        return (first[:, None] + head_offset).view(-1)

    @staticmethod
    def write(cache: Tensor, place_index: Tensor, new: Tensor) -> None:
        """Store `new (T, heads, head_dim)` at the rows that `place_index` names; `cache` is changed."""
        head_dim = cache.shape[-1]
        cache.view(-1, head_dim).index_copy_(0, place_index, new.reshape(-1, head_dim))
