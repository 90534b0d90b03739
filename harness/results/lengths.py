"""How long answers were, where the model and not the budget ends them (`IGNORE_EOS=0`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

_SHARES = (5, 25, 50, 75, 95)


@dataclass(frozen=True, slots=True)
class Lengths:
    """The output tokens of each answer, sorted, and how many answers their budget ended."""

    tokens: NDArray[np.int64]
    num_cut: int


def lengths_of(rows: pd.DataFrame) -> Lengths:
    """Of the answers that did not fail."""
    done = rows[rows["error"].isna() & rows["num_output_tokens"].notna()]
    tokens = np.sort(done["num_output_tokens"].to_numpy(dtype=np.int64))
    return Lengths(tokens, int((done["finish_reason"] == "length").sum()))


def lengths_in_words(rows: pd.DataFrame) -> str:
    """One line: quantiles of the output tokens of all answers, and what ended these."""
    lengths = lengths_of(rows)
    tokens, num_cut = lengths.tokens, lengths.num_cut
    if not len(tokens):
        return "no answers"
    quantiles = ", ".join(
        f"p{q} {value:.0f}" for q, value in zip(_SHARES, np.percentile(tokens, _SHARES), strict=True)
    )
    return (
        f"{quantiles}, max {tokens[-1]}, mean {tokens.mean():.1f} tokens; "
        f"{len(tokens) - num_cut} of {len(tokens)} ended by the model, {num_cut} by their budget"
    )


def length_table(lengths_by_name: Mapping[str, Lengths]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines: how many answers of each arm fall between neighbouring powers of two."""
    longest = max((int(own.tokens[-1]) for own in lengths_by_name.values() if len(own.tokens)), default=1)
    ends = [2**bits for bits in range(longest.bit_length() + 1) if 2 ** (bits - 1) < longest]
    ends = [0, *(end for end in ends if end >= min(8, ends[-1]))]
    bins = list(pairwise(ends))
    headers = ["answers of so many tokens", *(f"{low + 1}-{high}" for low, high in bins), "mean", "cut"]
    lines = []
    for name, own in lengths_by_name.items():
        counts = [int(((own.tokens > low) & (own.tokens <= high)).sum()) for low, high in bins]
        mean = f"{own.tokens.mean():.1f}" if len(own.tokens) else "-"
        lines.append([name, *map(str, counts), mean, str(own.num_cut)])
    return headers, lines
