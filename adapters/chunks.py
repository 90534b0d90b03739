"""What a backend with slots owes before a step: to refuse the whole of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from adapters.base import BackendError, CapacityError, ScheduledChunk


def check_chunks(
    chunks: Seq[ScheduledChunk],
    num_cached: Mapping[int, int],
    num_slots: int,
    max_model_len: int,
    *,
    may_pad: bool = False,
) -> None:
    """`num_cached` has the tokens in the cache of each sequence with a slot, by `seq_id`. `may_pad` is
    `BackendInfo.computes_padding`: dead rows may then stand behind the prompt.

    Raises:
        BackendError: a chunk does not continue what its slot holds.
        CapacityError: more sequences than slots, or a sequence longer than a slot.
    """
    num_new = 0
    for chunk in chunks:
        seq_id, end = chunk.seq.seq_id, chunk.start + chunk.num_tokens
        num_new += seq_id not in num_cached
        num_tokens = num_cached.get(seq_id, 0)
        expected = num_tokens - 1 if chunk.dead else num_tokens
        is_padding = may_pad and chunk.dead and chunk.start >= max(num_tokens, chunk.seq.num_prompt_tokens)
        if chunk.start != expected and not is_padding:
            raise BackendError(
                f"sequence {seq_id} has {num_tokens} tokens in the cache, so its chunk must start at "
                f"{expected}, not at {chunk.start}"
            )
        if end > max_model_len:
            raise CapacityError(f"sequence {seq_id} needs {end} positions, a slot has {max_model_len}")
    free = num_slots - len(num_cached)
    if num_new > free:
        raise CapacityError(f"{num_new} new sequences need a slot, {free} of {num_slots} are free")
