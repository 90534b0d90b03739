"""How long answers were, where the model and not the budget ends them (`IGNORE_EOS=0`)."""

from __future__ import annotations

import numpy as np
import pandas as pd

_SHARES = (5, 25, 50, 75, 95)


def lengths_in_words(rows: pd.DataFrame) -> str:
    """One line: quantiles of the output tokens of all answers, and what ended these."""
    done = rows[rows["error"].isna()]
    lengths = done["num_output_tokens"].to_numpy(dtype=float)
    if not len(lengths):
        return "no answers"
    quantiles = ", ".join(
        f"p{q} {value:.0f}" for q, value in zip(_SHARES, np.percentile(lengths, _SHARES), strict=True)
    )
    num_cut = int((done["finish_reason"] == "length").sum())
    return (
        f"{quantiles}, max {lengths.max():.0f}, mean {lengths.mean():.1f} tokens; "
        f"{len(done) - num_cut} of {len(done)} ended by the model, {num_cut} by their budget"
    )
