"""Blocks of KV memory: which are free, who shares one, and what is still in those that nobody holds.

A full block of a prompt is remembered by a key, which stands for all tokens up to its end. Who begins with
the same tokens holds the same block. A remembered block that nobody holds counts as free: it is used again
once no other is left, the one that was held least recently first.

Source: vLLM's blocks with reference counts (Kwon et al., SOSP 2023, arXiv 2309.06180) and the chained keys of
its automatic prefix caching.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from adapters.base import KV_BLOCK


def prefix_keys(token_ids: Seq[int]) -> list[bytes]:
    """The keys of a prompt's full blocks, but not of the last token's block, which is always computed."""
    keys, key = [], b""
    for begin in range(0, (len(token_ids) - 1) // KV_BLOCK * KV_BLOCK, KV_BLOCK):
        tokens = array("q", token_ids[begin : begin + KV_BLOCK]).tobytes()
        key = hashlib.blake2b(key + tokens, digest_size=16).digest()
        keys.append(key)
    return keys


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        # The lowest first: memory that was never needed is never touched.
        self._empty = list(range(num_blocks))
        self._num_holders = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # remembered and held by nobody, the least recently held first

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._idle)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The remembered blocks of the first of these keys, as far as they go."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_held(self, blocks: Iterable[int]) -> int:
        """How many of these somebody holds."""
        return sum(self._num_holders[block] > 0 for block in blocks)

    def num_held_once(self, blocks: Iterable[int]) -> int:
        """How many of these have one holder alone."""
        return sum(self._num_holders[block] == 1 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._idle.pop(block, None)
            self._num_holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Blocks with nothing in them, held once; so many must be free."""
        blocks = []
        for _ in range(count):
            if self._empty:
                block = heapq.heappop(self._empty)
            else:
                block = next(iter(self._idle))
                del self._block_of[self._key_of.pop(block)]
            blocks.append(block)
            self.hold([block])
        return blocks

    def give_back(self, blocks: Seq[int]) -> None:
        """One holder less. Of a prompt the end is used again first: more prompts begin alike than end so."""
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                heapq.heappush(self._empty, block)

    def remember(self, block: int, key: bytes) -> None:
        """What belongs to `key` is in `block` now; the first block of a key is the one that is found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key
