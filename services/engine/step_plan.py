"""One step as it is laid out: which sequence computes which places.

The sequences that have a slot enter; a `StepPlan` leaves. Decode rows go first and prompts are cut at
multiples of `prefill_chunk`, so a long prompt holds up nobody's next token for more than one step, and where
there is a threshold, for about a chunk; short prompts go before long ones, so it holds up their first token
no longer either. It changes no sequence and does not know who was admitted why.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from adapters.base import ScheduledChunk, Sequence, SequenceState
from services.engine.limits import SchedulerLimits

_RUNNING = SequenceState.RUNNING


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, decode and dead rows first. Without `chunks` there is nothing to compute before
    `recheck_at_s` (None: before the next message)."""

    chunks: list[ScheduledChunk]
    num_rows: int
    """Live rows only, here as in `mean_batch_size`; dead ones are counted apart."""
    num_dead_rows: int
    num_prompt_tokens: int
    num_decode_tokens: int
    recheck_at_s: float | None

    def in_hindsight(self) -> StepPlan:
        """The same step with the rows of sequences that have ended since as dead ones.

        Nobody takes their output any more, so they count as what they were: computed for nothing. A
        prompt chunk among them becomes one dead row; its tokens stay in `num_prompt_tokens`.
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


def lay_out(
    sequences: Seq[Sequence], num_dead: int, limits: SchedulerLimits, recheck_at_s: float | None
) -> StepPlan:
    """The next step of `sequences`, of which `num_dead` have nothing more to compute."""
    chunks: list[ScheduledChunk] = []
    prompts: list[Sequence] = []
    for seq in sequences:
        num_computed = seq.num_computed_tokens
        if seq.state is not _RUNNING:
            chunks.append(ScheduledChunk(seq, num_computed - 1, 1, dead=True))
        elif num_computed < len(seq.prompt_token_ids):
            prompts.append(seq)
        else:
            chunks.append(ScheduledChunk(seq, num_computed, 1))
    num_decode_tokens = len(chunks) - num_dead
    num_prompt_tokens = 0
    if prompts:
        threshold = limits.long_prefill_token_threshold if num_decode_tokens else 0
        num_prompt_tokens = _add_prompt_chunks(chunks, prompts, limits, threshold)
    return StepPlan(
        chunks, len(chunks) - num_dead, num_dead, num_prompt_tokens, num_decode_tokens, recheck_at_s
    )


def _add_prompt_chunks(
    chunks: list[ScheduledChunk], prompts: list[Sequence], limits: SchedulerLimits, threshold: int
) -> int:
    """Fill the rest of the step with `prompts`, listed as they were admitted; returns the tokens added.

    Those above `threshold` (0: none is) come last, and have as many chunks among them as they are.
    """
    size, room = limits.prefill_chunk, limits.max_step_tokens - len(chunks)
    long = [seq for seq in prompts if 0 < threshold < len(seq.prompt_token_ids)]
    short = [seq for seq in prompts if not 0 < threshold < len(seq.prompt_token_ids)]
    kept = min(size, _num_left(long[0])) if long and long[0] is prompts[0] else 0
    num_tokens = _fill(chunks, short, room - kept, size)
    return num_tokens + _fill(chunks, long, min(room - num_tokens, size * len(long)), size)


def _fill(chunks: list[ScheduledChunk], prompts: list[Sequence], room: int, size: int) -> int:
    """Give `room` tokens to `prompts`, fewest tokens left first; returns the tokens given.

    So a short prompt does not wait for all of a long one. One chunk of `size` is kept for the prompt that
    was admitted first, so that it moves at each step and none starves.
    """
    free = room
    kept = min(size, _num_left(prompts[0])) if prompts else 0
    for seq in sorted(prompts, key=_num_left):
        if seq is prompts[0]:
            kept = 0
        num_tokens = _num_left(seq)
        if num_tokens > free - kept:
            num_tokens = max(free - kept, 0)
            num_tokens -= (seq.num_computed_tokens + num_tokens) % size
        if num_tokens > 0:
            chunks.append(ScheduledChunk(seq, seq.num_computed_tokens, num_tokens))
            free -= num_tokens
    return room - free


def _num_left(seq: Sequence) -> int:
    """Tokens of its prompt that are still to be computed."""
    return len(seq.prompt_token_ids) - seq.num_computed_tokens
