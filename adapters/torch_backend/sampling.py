"""From logits to the next token of each row.

What enters are logits `(n, vocabulary)` and the sequences they belong to; what leaves is one token id a row.
Plain greedy rows are an argmax. Each other row is worked out alone, from its own seed, place and tokens, so
that a token never depends on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from adapters.base import Sequence
from adapters.sampling import choose_token
from adapters.torch_backend.cpu_kernels import CpuKernels


def choose_tokens(logits: Tensor, sequences: Seq[Sequence], kernels: CpuKernels | None = None) -> list[int]:
    """One token id for each row; `logits` may have padding rows behind those of `sequences`."""
    logits = logits[: len(sequences)]
    if kernels is not None and kernels.dtype == logits.dtype:
        tokens = kernels.argmax(logits)
    elif logits.device.type == "cpu":
        # NumPy's argmax over rows is about 20 times faster than torch's on a CPU.
        tokens = logits.float().numpy().argmax(-1).tolist()
    else:
        tokens = logits.argmax(-1).tolist()
    for row, seq in enumerate(sequences):
        if seq.params.temperature > 0 or seq.params.has_penalties:
            tokens[row] = choose_token(logits[row].float().cpu().numpy(), seq)
    return tokens
