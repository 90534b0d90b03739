"""One step's tokens in the arrays that `llama_decode` reads, allocated once and filled each step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq

import llama_cpp.llama_cpp as C
import numpy as np


class StepBatch:
    """Room for `capacity` tokens. Each token belongs to one slot, and is marked if logits are wanted."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tokens = np.zeros(capacity, dtype=np.int32)
        self._positions = np.zeros(capacity, dtype=np.int32)
        self._slots = np.zeros(capacity, dtype=np.int32)
        self._wanted = np.zeros(capacity, dtype=np.int8)
        self._ones = np.ones(capacity, dtype=np.int32)
        # The format allows several sequences a token, so it wants a pointer for each.
        addresses = self._slots.ctypes.data + 4 * np.arange(capacity, dtype=np.uint64)
        self._slot_pointers = addresses.astype(np.uintp)
        self._batch = C.llama_batch()
        self._batch.token = self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._batch.pos = self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._batch.n_seq_id = self._ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._batch.seq_id = self._slot_pointers.ctypes.data_as(
            ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))
        )
        self._batch.logits = self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def fill(self, tokens: Seq[int], positions: Seq[int], slots: Seq[int], wanted: Seq[int]) -> C.llama_batch:
        """The batch of these rows; valid until the next call. `wanted` are the rows whose logits are read."""
        num = len(tokens)
        self._tokens[:num] = tokens
        self._positions[:num] = positions
        self._slots[:num] = slots
        self._wanted[:num] = 0
        self._wanted[wanted] = 1
        self._batch.n_tokens = num
        return self._batch
