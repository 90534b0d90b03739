"""Blocks under random traffic: each is free or held, by those who say so, and has in it what its key says."""

from __future__ import annotations

import random
from collections import Counter

from adapters.base import KV_BLOCK
from services.engine.block_pool import BlockPool, prefix_keys


def test_a_key_stands_for_all_tokens_up_to_the_end_of_its_block() -> None:
    ids = list(range(50))
    keys = prefix_keys(ids)
    assert len(keys) == len(set(keys)) == 3
    assert prefix_keys(ids[:49]) == keys
    assert prefix_keys(ids[:48]) == keys[:2], "the block of the last token is computed"
    assert prefix_keys(ids[:KV_BLOCK]) == []
    changed = prefix_keys([ids[0] + 1, *ids[1:]])
    assert not set(changed) & set(keys)
    assert prefix_keys([*ids[:20], 99, *ids[21:]])[0] == keys[0]


def test_the_least_recently_held_goes_first_and_the_end_of_a_prompt_before_its_beginning() -> None:
    pool = BlockPool(4)
    first, second = pool.take(2), pool.take(2)
    for blocks, name in ((first, b"a"), (second, b"b")):
        for index, block in enumerate(blocks):
            pool.remember(block, name + bytes([index]))
    pool.give_back(second)
    pool.give_back(first)
    pool.hold(pool.find([b"b\0", b"b\1"]))  # used again: the other prompt is the older one now
    pool.give_back(second)
    assert pool.num_free == 4
    assert pool.take(1) == [first[1]]
    assert pool.find([b"a\0", b"a\1"]) == [first[0]]
    assert pool.find([b"b\0", b"b\1"]) == second


def test_no_block_is_lost_or_freed_twice_in_10_000_steps() -> None:
    rng = random.Random(1)
    pool = BlockPool(40)
    held: list[tuple[list[int], list[bytes]]] = []
    content: dict[int, bytes] = {}
    num_hits = 0
    for _ in range(10_000):
        family = rng.randrange(6)
        keys = [bytes([family, index]) for index in range(rng.randint(1, 8))]
        found = pool.find(keys)
        assert [content[block] for block in found] == keys[: len(found)]
        num_new = rng.randint(len(keys), 12) - len(found)
        free_after_hold = pool.num_free - (len(found) - pool.num_held(found))
        if free_after_hold >= num_new:
            num_hits += len(found)
            pool.hold(found)
            blocks = found + pool.take(num_new)
            for block in blocks[len(found) :]:
                content[block] = b""
            for block, key in zip(blocks, keys, strict=False):
                if rng.random() < 0.8:
                    pool.remember(block, key)
                    content[block] = key
            held.append((blocks, keys))
        while held and (free_after_hold < num_new or rng.random() < 0.3):
            blocks, _ = held.pop(rng.randrange(len(held)))
            pool.give_back(blocks)
            free_after_hold = num_new
        holders = Counter(block for blocks, _ in held for block in blocks)
        assert pool.num_free == 40 - len(holders)
        assert pool.num_held(range(40)) == len(holders)
    assert num_hits > 1000
    for blocks, _ in held:
        pool.give_back(blocks)
    assert sorted(pool.take(40)) == list(range(40))
