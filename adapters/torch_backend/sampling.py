"""From logits to the next token of each row.

What enters are logits `(n, vocabulary)` and the sequences they belong to; what leaves is one token id a row.
Plain greedy rows are an argmax. Each other row is worked out alone, from its own seed, place and tokens, so
that a token never depends on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from adapters.base import Sequence
from adapters.sampling import choose_token


def choose_tokens(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """One token id for each row; `logits` may have padding rows behind those of `sequences`."""
    logits = logits[: len(sequences)].float()
    sampled = [
        row for row, seq in enumerate(sequences) if seq.params.temperature > 0 or seq.params.has_penalties
    ]
    if logits.device.type != "cpu":
        tokens: list[int] = logits.argmax(-1).tolist()
        rows = logits[sampled].cpu().numpy() if sampled else np.empty((0, 0), dtype=np.float32)
        scores = dict(zip(sampled, rows, strict=True))
    else:
        # NumPy's argmax over rows is about 20 times faster than torch's on a CPU.
        values = logits.numpy()
        tokens = values.argmax(-1).tolist()
        scores = {row: values[row] for row in sampled}
    for row, score in scores.items():
        tokens[row] = choose_token(score, sequences[row])
    return tokens
