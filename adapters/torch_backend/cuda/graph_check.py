"""Does a decode row come out of a graph as it does without one?"""

from __future__ import annotations

import math

import torch

from adapters.base import SamplingParams, ScheduledChunk, Sequence
from adapters.torch_backend.cuda.step_graphs import DecodeGraphs
from adapters.torch_backend.loading import Forward
from adapters.torch_backend.packing import StepPacker

_NUM_TOKENS = 20


def replay_error(graphs: DecodeGraphs, packer: StepPacker, forward: Forward, vocab_size: int) -> float:
    """The relative error of one row's logits from the smallest and the largest graph; not a number counts."""
    count = min(_NUM_TOKENS, packer.max_len - 1)
    probe = Sequence(-1, [(7 + 13 * i) % vocab_size for i in range(count)], SamplingParams())
    batch = packer.pack([ScheduledChunk(probe, 0, count)])
    forward(batch.input_ids, batch.layout, batch.logit_rows)
    probe.output_token_ids = [1]
    chunk = ScheduledChunk(probe, count, 1)
    batch = packer.pack([chunk])
    want = forward(batch.input_ids, batch.layout, batch.logit_rows)[0].float()
    plan = packer.plan([chunk])
    worst = 0.0
    for size in (graphs.sizes[0], graphs.sizes[-1]):
        words = torch.tensor(graphs.padded(size, plan.ids, plan.slots, plan.positions)).flatten()
        graphs.words[: len(words)].copy_(words)
        graphs.replay(size)
        assert graphs.logits is not None
        error = float((graphs.logits[0].float() - want).norm() / want.norm())
        worst = max(worst, error if error == error else math.inf)
    packer.slots.release(probe.seq_id)
    return worst
