"""Lays out one step: which sequence computes which positions.

Rows stand before prompts. What prompts a step carries, and whether the decode rows wait meanwhile, is the
layout's answer (`services.layouts`). Nothing here changes a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from adapters.base import ScheduledChunk, Sequence, SequenceState
from services.engine.limits import SchedulerLimits
from services.layouts.base import StepBudget, StepLayout

_RUNNING = SequenceState.RUNNING


@dataclass(slots=True)  # not frozen, which takes three times as long: each step makes one
class StepPlan:
    """One step, decode and dead rows first.

    Without `chunks` there is nothing to compute before `recheck_at_s`, or, if that is None, before the next
    message.
    """

    chunks: list[ScheduledChunk]
    num_rows: int
    """Live rows only, here as in `mean_batch_size`; dead ones are counted apart."""
    num_dead_rows: int
    num_prompt_tokens: int
    num_decode_tokens: int
    recheck_at_s: float | None
    released_seq_ids: list[int] = field(default_factory=list)
    """Their cache space is to be freed before this step is launched."""
    num_preempted: int = 0
    num_looked_up_tokens: int = 0
    """Prompt tokens of the sequences that first joined for this step, where prefixes are kept."""
    num_cached_tokens: int = 0
    """Those of them whose keys and values were there."""

    def apart(self) -> list[StepPlan]:
        """Its live rows as steps of one row each."""
        return [
            replace(
                self,
                chunks=[chunk],
                num_rows=1,
                num_dead_rows=0,
                num_prompt_tokens=0 if chunk.is_decode else chunk.num_tokens,
                num_decode_tokens=int(chunk.is_decode),
                num_preempted=0,
                num_looked_up_tokens=0,
                num_cached_tokens=0,
            )
            for chunk in self.chunks
            if not chunk.dead
        ]

    def with_looked_up(self, joined: Seq[Sequence]) -> StepPlan:
        """The same step, for which these sequences first joined, after their prompts were looked up."""
        return replace(
            self,
            num_looked_up_tokens=sum(seq.num_prompt_tokens for seq in joined),
            num_cached_tokens=sum(seq.num_cached_tokens for seq in joined),
        )

    def with_ended_rows_dead(self) -> StepPlan:
        """The same step with the rows of sequences that have ended since it was launched as dead rows.

        They were computed in vain, and are counted so. A prompt chunk becomes one dead row; its tokens stay
        in `num_prompt_tokens`.
        """
        late = [c for c in self.chunks if c.seq.state is SequenceState.FINISHED and not c.dead]
        if not late:
            return self
        ended = {chunk.seq.seq_id for chunk in late}
        return replace(
            self,
            chunks=[replace(c, dead=True) if c.seq.seq_id in ended else c for c in self.chunks],
            num_rows=self.num_rows - len(late),
            num_dead_rows=self.num_dead_rows + len(late),
            num_decode_tokens=self.num_decode_tokens - sum(chunk.is_decode for chunk in late),
        )


def contexts(chunks: Iterable[ScheduledChunk]) -> dict[str, int]:
    """The fields of `StepRecord` on what a step attends to: the work that its rows do not tell."""
    num_prompt_chunks = decode_tokens = prompt_tokens = 0
    for chunk in chunks:
        start, num_tokens = chunk.start, chunk.num_tokens
        if chunk.dead or chunk.is_decode:
            decode_tokens += start + num_tokens
        else:
            num_prompt_chunks += 1
            prompt_tokens += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return {
        "num_prompt_chunks": num_prompt_chunks,
        "decode_context_tokens": decode_tokens,
        "prompt_context_tokens": prompt_tokens,
    }


def lay_out(
    layout: StepLayout,
    limits: SchedulerLimits,
    recheck_at_s: float | None,
    sequences: Seq[Sequence],
    num_dead: int,
    *,
    others_wait: bool = False,
) -> StepPlan:
    """The next step of `sequences`, in order of admission, of which `num_dead` have ended.

    With `others_wait` it delays the next tokens of running sequences that have no row in it.
    """
    rows: list[ScheduledChunk] = []
    prompts: list[Sequence] = []
    for seq in sequences:
        num_computed = seq.num_computed_tokens
        if seq.state is not _RUNNING:
            # It computes its last position over and over, or grows as those of generate() do.
            grows = limits.pads_like_generate and num_computed < limits.max_model_len
            rows.append(ScheduledChunk(seq, num_computed if grows else num_computed - 1, 1, dead=True))
        elif num_computed < seq.num_prefill_tokens:
            prompts.append(seq)
        else:
            rows.append(ScheduledChunk(seq, num_computed, 1))
    if prompts and (layout.rows_wait or limits.pads_like_generate):
        rows, num_dead = [], 0
    num_decode_tokens = len(rows) - num_dead
    if not prompts:
        return StepPlan(rows, num_decode_tokens, num_dead, 0, num_decode_tokens, recheck_at_s)
    added = chunks_of_prompts(
        layout, limits, prompts, num_rows=len(rows), others_wait=others_wait or num_decode_tokens > 0
    )
    num_prompt_tokens = sum(chunk.num_tokens for chunk in added)
    chunks = rows + added
    return StepPlan(
        chunks, len(chunks) - num_dead, num_dead, num_prompt_tokens, num_decode_tokens, recheck_at_s
    )


def chunks_of_prompts(
    layout: StepLayout, limits: SchedulerLimits, prompts: Seq[Sequence], *, num_rows: int, others_wait: bool
) -> list[ScheduledChunk]:
    """What the step carries of prompts beside `num_rows` rows, dead ones included."""
    # Where nothing decodes, a long step makes no one wait for a next token.
    threshold = limits.long_prefill_token_threshold if others_wait else 0
    budget = StepBudget(limits.max_step_tokens - num_rows, limits.prefill_chunk, threshold)
    return layout.prompt_chunks(prompts, budget)
