"""How a sequence ends: its last update, with the account of its time."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from collections.abc import Set as AbstractSet

from adapters.base import FinishReason, Sequence, SequenceState
from services.contract.timings import SequenceTimings
from services.engine.messages import SequenceUpdate

_NEVER = frozenset[int]()


def append_tokens(seq: Sequence, token_ids: Seq[int], eos_token_ids: AbstractSet[int]) -> FinishReason | None:
    """Give `seq` new tokens up to the one that ends it, and say why that one does; None where none does.

    An end-of-sequence token counts as output.
    """
    output, params = seq.output_token_ids, seq.params
    stops_at = _NEVER if params.ignore_eos else eos_token_ids
    if params.stop_token_ids:
        stops_at = stops_at | set(params.stop_token_ids)
    for token_id in token_ids:
        output.append(token_id)
        if token_id in stops_at:
            return "stop"
        if len(output) >= params.max_tokens:
            return "length"
    return None


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
