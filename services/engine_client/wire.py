"""How messages between the API and the engine are encoded for the pipe.

One message a step carries all its tokens, and encoding it is part of the step's time.
"""

from __future__ import annotations

import pickle

from services.engine.messages import Beat, EngineFailed, Ready, SequenceUpdate, StepReport

ToApi = Ready | StepReport | Beat | EngineFailed


def pack(message: ToApi) -> bytes:
    """Reports travel as tuples: pickling a dataclass for each row costs eight times as much."""
    if not isinstance(message, StepReport):
        return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    updates = [
        (update.seq_id, update.token_ids)
        if update.finish_reason is None and update.logprobs is None
        else (
            update.seq_id,
            update.token_ids,
            update.finish_reason,
            update.timings,
            update.error,
            update.logprobs,
        )
        for update in message.updates
    ]
    counts = (message.num_running, message.queue_depth, message.kv_used_tokens)
    return pickle.dumps(
        (updates, message.record, *counts, message.prefilling_seq_ids, message.figures),
        pickle.HIGHEST_PROTOCOL,
    )


def unpack(data: bytes) -> ToApi:
    """Undo `pack`. The data comes from a process of our own, so unpickling it is safe."""
    message = pickle.loads(data)
    if isinstance(message, tuple):
        updates, *rest = message
        return StepReport([SequenceUpdate(*update) for update in updates], *rest)
    assert isinstance(message, Ready | Beat | EngineFailed)
    return message
