"""Does a row come out of a graph as it does without one?"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor

from adapters.base import SamplingParams, ScheduledChunk, Sequence
from adapters.torch_backend.cuda.mixed_graphs import MixedGraphs
from adapters.torch_backend.cuda.packing import DevicePacker
from adapters.torch_backend.cuda.step_graphs import CapturedSteps, DecodeGraphs
from adapters.torch_backend.loading import Forward
from adapters.torch_backend.packing import RowPlan

_NUM_TOKENS = 20


def replay_error(graphs: DecodeGraphs, packer: DevicePacker, forward: Forward, vocab_size: int) -> float:
    """The relative error of one row's logits from the smallest and the largest graph; not a number counts."""
    probe = _sequence(-1, packer, vocab_size)
    chunk = _decoding(probe, packer, forward)
    want = _eager(packer, forward, chunk)
    plan = packer.plan([chunk])
    worst = max(_replayed(graphs, size, plan, want) for size in (graphs.sizes[0], graphs.sizes[-1]))
    packer.slots.release(probe.seq_id)
    return worst


def mixed_replay_error(graphs: MixedGraphs, packer: DevicePacker, forward: Forward, vocab_size: int) -> float:
    """The same for a decode row beside the second half of a prompt; one slot has room for the latter."""
    probes = [_sequence(-1 - i, packer, vocab_size) for i in range(min(2, packer.slots.num_slots))]
    *others, last = probes
    half = last.num_prompt_tokens // 2
    chunks = [_decoding(probe, packer, forward) for probe in others]
    _eager(packer, forward, ScheduledChunk(last, 0, half))
    chunks.append(ScheduledChunk(last, half, last.num_prompt_tokens - half))
    want = _eager(packer, forward, *chunks)
    plan = packer.plan(chunks)
    smallest = graphs.size_for(plan)
    assert smallest is not None
    worst = max(_replayed(graphs, size, plan, want) for size in (smallest, graphs.sizes[-1]))
    for probe in probes:
        packer.slots.release(probe.seq_id)
    return worst


def _sequence(seq_id: int, packer: DevicePacker, vocab_size: int) -> Sequence:
    count = min(_NUM_TOKENS, packer.max_len - 1)
    return Sequence(seq_id, [(7 - 5 * seq_id + 13 * i) % vocab_size for i in range(count)], SamplingParams())


def _decoding(probe: Sequence, packer: DevicePacker, forward: Forward) -> ScheduledChunk:
    """The chunk of the first token after the prompt, which is computed here."""
    _eager(packer, forward, ScheduledChunk(probe, 0, probe.num_prompt_tokens))
    probe.output_token_ids = [1]
    return ScheduledChunk(probe, probe.num_prompt_tokens, 1)


def _eager(packer: DevicePacker, forward: Forward, *chunks: ScheduledChunk) -> Tensor:
    batch = packer.pack(chunks)
    return forward(batch.input_ids, batch.layout, batch.logit_rows)[: len(batch.sampled)].float()


def _replayed(graphs: CapturedSteps, size: int, plan: RowPlan, want: Tensor) -> float:
    """The largest relative error of a sampled row."""
    words = torch.tensor([*chain(*graphs.padded(size, plan))])
    graphs.words[: len(words)].copy_(words)
    graphs.replay(size)
    assert graphs.logits is not None
    got = graphs.logits[: len(want)].float()
    error = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
    return error if error == error else math.inf
