"""How a sequence ends: its last update, with the account of its time."""

from __future__ import annotations

from adapters.base import FinishReason, Sequence, SequenceState
from services.contract.timings import SequenceTimings
from services.engine.messages import SequenceUpdate


def finish(
    seq: Sequence, token_ids: list[int], reason: FinishReason, now_s: float, error: str | None = None
) -> SequenceUpdate:
    """End `seq` and split its time since arrival into four parts."""
    seq.state = SequenceState.FINISHED
    seq.num_pending_tokens = 0
    seq.finish_reason = reason
    seq.finished_s = now_s
    admitted_s = now_s if seq.admitted_s is None else seq.admitted_s
    first_token_s = now_s if seq.first_token_s is None else seq.first_token_s
    timings = SequenceTimings(
        queue_s=max(0.0, admitted_s - seq.arrival_s - seq.batch_wait_s),
        batch_wait_s=seq.batch_wait_s,
        prefill_s=first_token_s - admitted_s,
        decode_s=now_s - first_token_s,
        num_steps=seq.num_steps,
        mean_batch_size=seq.sum_batch_rows / seq.num_steps if seq.num_steps else 0.0,
        num_cached_tokens=seq.num_cached_tokens,
        first_token_s=seq.first_token_s,
    )
    return SequenceUpdate(seq.seq_id, token_ids, reason, timings, error)
