"""Lays out one step: which sequence computes which positions.

Decode rows go first, so a decoding sequence gets a token from every step. The time of a step is what it waits
for that token, and prompts make steps long. Two rules bound it: a step has at most `max_step_tokens`, and
while others decode, prompts above `long_prefill_token_threshold` get about one chunk each. Among prompts the
shortest goes first, so that its first token does not wait for a long one.

Prompts are cut at multiples of `prefill_chunk`, counted from the start of the prompt. Nothing here changes a
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from adapters.base import ScheduledChunk, Sequence, SequenceState
from services.engine.limits import SchedulerLimits

_RUNNING = SequenceState.RUNNING


@dataclass(frozen=True, slots=True)
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
            )
            for chunk in self.chunks
            if not chunk.dead
        ]

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


def lay_out(
    sequences: Seq[Sequence],
    num_dead: int,
    limits: SchedulerLimits,
    recheck_at_s: float | None,
    *,
    others_wait: bool = False,
) -> StepPlan:
    """The next step of `sequences`, in order of admission, of which `num_dead` have ended.

    With `others_wait` it delays the next tokens of running sequences that have no row in it.
    """
    chunks: list[ScheduledChunk] = []
    prompts: list[Sequence] = []
    for seq in sequences:
        num_computed = seq.num_computed_tokens
        if seq.state is not _RUNNING:
            # It computes its last position over and over, as a finished row of a padded batch does.
            chunks.append(ScheduledChunk(seq, num_computed - 1, 1, dead=True))
        elif num_computed < len(seq.prompt_token_ids):
            prompts.append(seq)  # they go behind all rows
        else:
            chunks.append(ScheduledChunk(seq, num_computed, 1))
    num_decode_tokens = len(chunks) - num_dead
    num_prompt_tokens = 0
    if prompts:
        # Where nothing decodes, a long step makes no one wait for a next token.
        threshold = limits.long_prefill_token_threshold if num_decode_tokens or others_wait else 0
        num_prompt_tokens = _add_prompt_chunks(chunks, prompts, limits, threshold)
    return StepPlan(
        chunks, len(chunks) - num_dead, num_dead, num_prompt_tokens, num_decode_tokens, recheck_at_s
    )


def _add_prompt_chunks(
    chunks: list[ScheduledChunk], prompts: list[Sequence], limits: SchedulerLimits, threshold: int
) -> int:
    """Fill the rest of the step with `prompts`, listed as they were admitted; returns the tokens added.

    Prompts longer than `threshold` (0: none is) come last and share `prefill_chunk` tokens for each of them.
    """
    size, room = limits.prefill_chunk, limits.max_step_tokens - len(chunks)
    long = [seq for seq in prompts if 0 < threshold < len(seq.prompt_token_ids)]
    short = [seq for seq in prompts if not 0 < threshold < len(seq.prompt_token_ids)]
    # The prompt that was admitted first moves in every step, even if it is a long one.
    kept = min(size, _num_left(long[0])) if long and long[0] is prompts[0] else 0
    num_tokens = _fill(chunks, short, room - kept, size)
    return num_tokens + _fill(chunks, long, min(room - num_tokens, size * len(long)), size)


def _fill(chunks: list[ScheduledChunk], prompts: list[Sequence], room: int, size: int) -> int:
    """Give `room` tokens to `prompts`, fewest tokens left first; returns the tokens given.

    A short prompt so does not wait for all of a long one. Up to `size` tokens are kept for the prompt that
    was admitted first: it moves in every step, and none starves.
    """
    free = room
    kept = min(size, _num_left(prompts[0])) if prompts else 0
    for seq in sorted(prompts, key=_num_left):
        if seq is prompts[0]:
            kept = 0
        num_tokens = _num_left(seq)
        if num_tokens > free - kept:
            num_tokens = max(free - kept, 0)
            # Back to a multiple of `size`: what is computed together must not depend on who shares the step.
            num_tokens -= (seq.num_computed_tokens + num_tokens) % size
        if num_tokens > 0:
            chunks.append(ScheduledChunk(seq, seq.num_computed_tokens, num_tokens))
            free -= num_tokens
    return room - free


def _num_left(seq: Sequence) -> int:
    """Tokens of its prompt that are still to be computed."""
    return len(seq.prompt_token_ids) - seq.num_computed_tokens
