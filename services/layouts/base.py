"""The one question of a step layout: which rows and which prompt tokens does the next step carry?

A layout changes no sequence. Prompts are cut at multiples of `prefill_chunk`, counted from the start of the
prompt, so that what is computed together does not depend on who shares the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Protocol

from adapters.base import ScheduledChunk, Sequence


@dataclass(slots=True)  # not frozen, which takes three times as long: steps make one
class StepBudget:
    max_prompt_tokens: int
    """What the rows of the step leave."""
    prefill_chunk: int
    long_prompt_tokens: int
    """Somebody waits for a next token meanwhile, so prompts above this should make no long step; 0: none."""


class StepLayout(Protocol):
    name: ClassVar[str]
    rows_wait: ClassVar[bool]
    """True where a step with prompts has no decode rows and no dead ones."""

    def prompt_chunks(self, prompts: Seq[Sequence], budget: StepBudget) -> list[ScheduledChunk]:
        """The prompt chunks of the next step, at least one.

        `prompts` are the sequences whose prompt is not computed yet, at least one, in order of admission.
        """
        ...


def num_left(seq: Sequence) -> int:
    """Tokens that are still to be computed as a prompt."""
    return seq.num_prefill_tokens - seq.num_computed_tokens


def whole_prompts_within(prompts: Iterable[Sequence], budget: StepBudget) -> list[ScheduledChunk]:
    """Prompts whole, in order, until one does not fit.

    Only the first is cut, where it is longer than the whole room: it could never join in one piece.
    """
    room, size = budget.max_prompt_tokens, budget.prefill_chunk
    chunks: list[ScheduledChunk] = []
    for seq in prompts:
        num_tokens = num_left(seq)
        if num_tokens > room:
            if chunks:
                break
            num_tokens = room - (seq.num_computed_tokens + room) % size
        chunks.append(ScheduledChunk(seq, seq.num_computed_tokens, num_tokens))
        room -= num_tokens
    return chunks
