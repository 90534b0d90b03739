"""Do the other rows of a batch change a row's bits?

Checked for the linear layers, the attention and the whole forward pass as the backend uses them. It is run
at start, because which kernels a matrix library picks is known on the device alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapters.base import SamplingParams, ScheduledChunk, Sequence
from adapters.torch_backend.loading import Forward
from adapters.torch_backend.model.linear import RowRange, TiledLinear
from adapters.torch_backend.packing import StepPacker

TILE_ROWS = 64
"""Every product then has exactly this many rows, so that the matrix library sees one shape."""
TILES = RowRange(TILE_ROWS, TILE_ROWS)

_LENGTHS = (5, 70, 33, 64)


def changed_linears(module: nn.Module, device: torch.device) -> list[str]:
    """Layers, one of each shape, whose rows depend on the other rows of a tile or on their index in it."""
    layers = [m for m in module.modules() if isinstance(m, TiledLinear)]
    shapes = {(m.out_features, m.in_features, m.bias is None): m for m in layers}
    changed = []
    for (out_features, in_features, _), layer in shapes.items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(TILE_ROWS, in_features, generator=generator).to(device=device, dtype=layer.dtype)
        together = layer(x)
        for row, index in ((0, 0), (17, 0), (TILE_ROWS - 1, 5)):
            alone = torch.zeros_like(x)
            alone[index] = x[row]
            if not torch.equal(layer(alone)[index], together[row]):
                changed.append(f"linear layer {in_features} -> {out_features}")
                break
    return changed


def forward_is_changed(forward: Forward, packer: StepPacker, vocab_size: int) -> bool:
    """True where a decode row's logits differ alone, among others, or beside a prompt chunk."""
    count = min(len(_LENGTHS), packer.slots.num_slots)
    lengths = [min(length, packer.max_len - 1) for length in _LENGTHS[:count]]
    ids = [[(7 * i + 13 * j) % vocab_size for j in range(n)] for i, n in enumerate(lengths)]
    sequences = [Sequence(-1 - i, prompt, SamplingParams()) for i, prompt in enumerate(ids)]

    def logits(*chunks: ScheduledChunk) -> Tensor:
        batch = packer.pack(chunks)
        return forward(batch.input_ids, batch.layout, batch.logit_rows)[: len(batch.sampled)]

    def decode(seq: Sequence) -> ScheduledChunk:
        return ScheduledChunk(seq, seq.num_prompt_tokens, 1)

    for seq in sequences:
        logits(ScheduledChunk(seq, 0, seq.num_prompt_tokens))
        seq.output_token_ids = [1]
    alone = [logits(decode(seq))[0] for seq in sequences]
    together = logits(*map(decode, sequences))
    *rest, last = sequences
    packer.slots.release(last.seq_id)
    last.output_token_ids = []
    beside = logits(*map(decode, rest), ScheduledChunk(last, 0, last.num_prompt_tokens))
    for seq in sequences:
        packer.slots.release(seq.seq_id)
    return any(not torch.equal(row, together[i]) for i, row in enumerate(alone)) or any(
        not torch.equal(row, beside[i]) for i, row in enumerate(alone[:-1])
    )
