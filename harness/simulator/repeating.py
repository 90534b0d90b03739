"""A scheduler that can tell how often its last step repeats itself, and take these steps at once.

Between two events a batch of decode rows does the same thing step after step: the same rows, one token each,
nobody joins and nobody ends. The rule that says when is here; what a step does is the scheduler's own.
"""

from __future__ import annotations

from adapters.base import Sequence, SequenceState
from services.engine.scheduler import Scheduler

_RUNNING = SequenceState.RUNNING


class RepeatingScheduler(Scheduler):
    """The scheduler of the engine, with two more questions. Call both between steps only."""

    @property
    def batch(self) -> list[Sequence]:
        """All that have a slot, dead rows included; not to be changed."""
        return self._batch.sequences

    def repeating(self) -> tuple[int, list[Sequence]]:
        """How many of the next steps are alike, if no message comes, and their live rows.

        The step in which a sequence ends is none of them, nor is one that needs more KV.
        """
        batch, strategy = self._batch, self._strategy
        if self._alone or not batch.num_live:
            return 0, []
        # A strategy that does not say counts as one that may admit. An order that changes with time arranges
        # the queue at every step in which a slot is free.
        may_change = getattr(strategy, "admits_while_running", True) or self._note_served is not None
        if self._waiting:
            if batch.has_free_slot and may_change:
                return 0, []
            if self._held_back != self._find_held_back():
                return 0, []  # room came free with the last step: the next one charges another wait
        fewest = 1 << 60
        live = []
        for seq in batch.sequences:
            if seq.state is not _RUNNING:
                continue
            if seq.num_computed_tokens < seq.num_prefill_tokens:
                return 0, []
            live.append(seq)
            left = seq.params.max_tokens - len(seq.output_token_ids) - 1
            fewest = min(fewest, left, batch.num_steps_within(seq))
        return fewest, live

    def repeat(self, live: list[Sequence], num_steps: int) -> None:
        """Take `num_steps` steps of `repeating` at once; each gives token 0 to every row of `live`."""
        num_rows = len(live)
        tokens = [0] * num_steps
        for seq in live:
            seq.output_token_ids += tokens
            seq.num_computed_tokens += num_steps
            seq.num_steps += num_steps
            seq.sum_batch_rows += num_steps * num_rows
            if self._note_served is not None:
                self._note_served(seq, num_steps)
