"""From logits to the next token of each row.

A row that is not plainly greedy is worked out alone, from its own seed, position and tokens, so that a token
never depends on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adapters.base import Sequence
from adapters.sampling import choose_token
from adapters.torch_backend.cpu.kernels import CpuKernels


def choose_tokens(logits: Tensor, sequences: Seq[Sequence], likeliest: list[int]) -> list[int]:
    """One token id for each row; `logits` may have rows behind those of `sequences`.

    `likeliest` are the ids of the largest logits; the list is changed and returned.
    """
    for row, seq in enumerate(sequences):
        if not seq.params.is_plain_greedy:
            likeliest[row] = choose_token(numbers_of(logits[row]), seq)
    return likeliest


def numbers_of(logits: Tensor) -> NDArray[np.float32]:
    """`logits (vocabulary,)` of one row on the host."""
    numbers: NDArray[np.float32] = logits.float().cpu().numpy()
    return numbers


def find_likeliest(logits: Tensor, kernels: CpuKernels | None) -> list[int]:
    """The argmax of each row of `logits (n, vocabulary)`, the first of equals."""
    if kernels is not None and kernels.dtype == logits.dtype:
        return kernels.argmax(logits)
    if logits.device.type == "cpu":
        # NumPy's argmax over rows is about 20 times faster than torch's on a CPU.
        likeliest: list[int] = logits.float().numpy().argmax(-1).tolist()
    else:
        likeliest = logits.argmax(-1).tolist()
    return likeliest
