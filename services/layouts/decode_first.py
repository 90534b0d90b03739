"""Decode first: every decoding sequence gets a token from every step, and prompts fill what is left.

The time of a step is what a decoding sequence waits for its token, and prompts make steps long. While others
decode, prompts above a threshold therefore get about one chunk each. Among prompts the shortest goes first,
so that its first token does not wait for a long one.

Source: chunked prefill beside decode, Agrawal et al., "Sarathi-Serve" (OSDI 2024, arXiv 2403.02310).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from adapters.base import ScheduledChunk, Sequence
from services.layouts.base import StepBudget, num_left


class DecodeFirst:
    name: ClassVar[str] = "decode_first"
    rows_wait: ClassVar[bool] = False

    def prompt_chunks(self, prompts: Seq[Sequence], budget: StepBudget) -> list[ScheduledChunk]:
        """Prompts above the threshold come last and share `prefill_chunk` tokens for each of them."""
        size, room, threshold = budget.prefill_chunk, budget.max_prompt_tokens, budget.long_prompt_tokens
        long = [seq for seq in prompts if seq.num_prefill_tokens > threshold] if threshold else []
        short = [seq for seq in prompts if seq.num_prefill_tokens <= threshold] if long else prompts
        # The prompt that was admitted first moves in every step, even if it is a long one.
        kept = min(size, num_left(long[0])) if long and long[0] is prompts[0] else 0
        chunks: list[ScheduledChunk] = []
        room -= _fill(chunks, short, room - kept, size)
        if long:
            _fill(chunks, long, min(room, size * len(long)), size)
        return chunks


def _fill(chunks: list[ScheduledChunk], prompts: Seq[Sequence], room: int, size: int) -> int:
    """Give `room` tokens to `prompts`, fewest tokens left first; returns the tokens given.

    A short prompt so does not wait for all of a long one. Up to `size` tokens are kept for the prompt that
    was admitted first: it moves in every step, and none starves.
    """
    free = room
    kept = min(size, num_left(prompts[0])) if prompts else 0
    for seq in sorted(prompts, key=num_left) if len(prompts) > 1 else prompts:
        if seq is prompts[0]:
            kept = 0
        num_tokens = num_left(seq)
        if num_tokens > free - kept:
            num_tokens = max(free - kept, 0)
            # Back to a multiple of `size`: what is computed together must not depend on who shares the step.
            num_tokens -= (seq.num_computed_tokens + num_tokens) % size
        if num_tokens > 0:
            chunks.append(ScheduledChunk(seq, seq.num_computed_tokens, num_tokens))
            free -= num_tokens
    return room - free
