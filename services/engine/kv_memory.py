"""The account of KV memory: how much of it each sequence of the batch holds, and which blocks.

A policy that gives memory in blocks names the blocks of a sequence, and sequences that begin alike can share
some (`PREFIX_CACHE=1`). A shared block counts once. Only whole blocks of a prompt are shared, as they were
computed as a prompt: output has other bits where a backend computes decode rows along another path.
"""

from __future__ import annotations

import math

from adapters.base import KV_BLOCK, Sequence
from services.engine.block_pool import BlockPool
from services.engine.limits import SchedulerLimits
from services.kv_policies.base import KvPolicy


class KvMemory:
    def __init__(self, kv: KvPolicy, limits: SchedulerLimits) -> None:
        self._kv = kv
        self._capacity_tokens = limits.kv_capacity_tokens
        self._num_spare_tokens = kv.num_spare_tokens(limits.kv_capacity_tokens)
        self._pool = BlockPool(limits.kv_capacity_tokens // KV_BLOCK) if kv.block_tokens == KV_BLOCK else None
        # Prompts are cut at multiples of a chunk, and what is computed together must not depend on a hit.
        self._hit_blocks = math.lcm(KV_BLOCK, limits.prefill_chunk) // KV_BLOCK
        self.held_tokens: dict[int, int] = {}
        """What each sequence holds, by `seq_id`; not to be changed."""
        self._free_tokens = limits.kv_capacity_tokens  # where there are no blocks

    @property
    def used_tokens(self) -> int:
        """KV positions that sequences hold."""
        return self._capacity_tokens - self.free_tokens

    @property
    def free_tokens(self) -> int:
        return self._free_tokens if self._pool is None else self._pool.num_free * KV_BLOCK

    def num_spare_tokens(self, *, is_alone: bool) -> int:
        """Positions that must stay free when a sequence joins. One that `is_alone` may take all."""
        return 0 if is_alone else self._num_spare_tokens

    def num_to_join(self, seq: Sequence, *, shared: bool = True) -> int:
        """The free positions that a waiting sequence would take, less those that it can have `shared`."""
        num_tokens = self._kv.num_tokens(seq)
        if self._pool is None or not (shared and seq.prefix_keys):
            return num_tokens
        return num_tokens - KV_BLOCK * self._pool.num_held(self._found(self._pool, seq))

    def num_held_alone(self, seq: Sequence) -> int:
        """The positions that come free when `seq` leaves."""
        if self._pool is None:
            return self.held_tokens[seq.seq_id]
        return KV_BLOCK * self._pool.num_held_once(seq.block_ids)

    def num_to_grow(self, seq: Sequence) -> int:
        """The free positions that a running sequence would take for its next step."""
        return self._kv.num_tokens(seq) - self.held_tokens[seq.seq_id]

    def join(self, seq: Sequence) -> None:
        """Give `seq` what it needs to join; what is in shared blocks already counts as computed."""
        self.held_tokens[seq.seq_id] = num_tokens = self._kv.num_tokens(seq)
        if self._pool is None:
            self._free_tokens -= num_tokens
            return
        found = self._found(self._pool, seq)
        self._pool.hold(found)
        seq.block_ids = found + self._pool.take(num_tokens // KV_BLOCK - len(found))
        seq.num_computed_tokens = len(found) * KV_BLOCK
        if seq.admitted_s is None:
            seq.num_cached_tokens = seq.num_computed_tokens

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        self.held_tokens[seq.seq_id] += num_tokens
        if self._pool is None:
            self._free_tokens -= num_tokens
        else:
            seq.block_ids += self._pool.take(num_tokens // KV_BLOCK)

    def leave(self, seq: Sequence) -> None:
        num_tokens = self.held_tokens.pop(seq.seq_id)
        if self._pool is None:
            self._free_tokens += num_tokens
            return
        self._pool.give_back(seq.block_ids)
        seq.block_ids = []

    def note_computed(self, seq: Sequence, start: int) -> None:
        """The positions from `start` on are computed: others may share their full blocks."""
        if self._pool is not None:
            end = min(seq.num_computed_tokens // KV_BLOCK, len(seq.prefix_keys))
            for index in range(start // KV_BLOCK, end):
                self._pool.remember(seq.block_ids[index], seq.prefix_keys[index])

    def _found(self, pool: BlockPool, seq: Sequence) -> list[int]:
        found = pool.find(seq.prefix_keys)
        return found[: len(found) - len(found) % self._hit_blocks]
