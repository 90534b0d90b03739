"""What the blocks of a comparison say about each deciding metric: one `Contrast` for each arm and figure.

Within a block the same planned request is taken under both arms, and only if both answered it. Each block
gives one logarithm of a ratio, and `verdict` judges those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from harness.comparing.verdict import DEFAULT_MARGIN, Verdict, judge_ratio
from harness.results.metrics import OUTPUT_TOKENS, REQUEST_TIME, Figure, Metric, deciding_figures


@dataclass(frozen=True, slots=True)
class Contrast:
    """One figure of `arm` against `reference`; `verdict` None where no block has both values."""

    arm: str
    reference: str
    figure: Figure
    verdict: Verdict | None
    log_ratios: tuple[float, ...]

    def text(self) -> str:
        """As 4.00x [3.90-4.10]; the bare ratio where one block is all there is."""
        found = self.verdict
        if found is None:
            return "n too small"
        return f"{ratio_text(found.ratio)}" + (f" [{found.interval_text()}]" if found.interval else "")


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"


def primary(is_open: bool) -> Metric:
    """What a comparison is decided by first: an open loop delivers its rate under every arm that keeps up."""
    return REQUEST_TIME if is_open else OUTPUT_TOKENS


def error_share(figure: Figure, is_open: bool, num_judged: int) -> float:
    """Half of the allowed error is for the primary metric, the others share the rest."""
    return 0.5 if figure.metric is primary(is_open) else 0.5 / max(1, num_judged - 1)


def contrasts(
    rows: pd.DataFrame,
    arms: Sequence[str],
    reference: str,
    *,
    is_open: bool,
    margin: float = DEFAULT_MARGIN,
    figures: Sequence[Figure] | None = None,
) -> list[Contrast]:
    """Every arm but the reference, each with all deciding figures (or with `figures`).

    The intervals of all deciding figures hold together for one arm.
    """
    deciding = deciding_figures()
    judged = deciding if figures is None else figures
    num_judged = max(len(deciding), len(judged))
    found: list[Contrast] = []
    of_reference = dict(tuple(rows[rows["arm"] == reference].groupby("repeat")))
    for arm in arms:
        if arm == reference:
            continue
        pairs = [
            both_answered(ours, of_reference[block])
            for block, ours in rows[rows["arm"] == arm].groupby("repeat")
            if block in of_reference
        ]
        for figure in judged:
            each = (_log_ratio(figure, ours, theirs, is_open) for ours, theirs in pairs)
            logs = [log for log in each if log is not None]
            verdict = None
            if logs:
                verdict = judge_ratio(
                    logs,
                    higher_is_better=figure.metric.higher_is_better,
                    error_share=error_share(figure, is_open, num_judged),
                    margin=margin,
                )
            found.append(Contrast(arm, reference, figure, verdict, tuple(logs)))
    return found


def both_answered(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same planned requests of one block under two arms, those left out that got no token in either."""
    ours, theirs = (
        part[part["error"].isna() & part["total_sched_ms"].notna()].set_index("schedule_index")
        for part in (ours, theirs)
    )
    common = ours.index.intersection(theirs.index)
    return ours.loc[common], theirs.loc[common]


def _log_ratio(figure: Figure, ours: pd.DataFrame, theirs: pd.DataFrame, is_open: bool) -> float | None:
    pair = figure.value(ours, is_open), figure.value(theirs, is_open)
    return math.log(pair[0] / pair[1]) if pair[0] and pair[1] else None


def contrast_table(found: Sequence[Contrast]) -> tuple[list[str], list[list[str]]]:
    """Headers, and one line an arm."""
    arms = list(dict.fromkeys(contrast.arm for contrast in found))
    labels = list(dict.fromkeys(contrast.figure.label for contrast in found))
    return ["arm", *labels], [[arm, *(c.text() for c in found if c.arm == arm)] for arm in arms]


def decision(found: Sequence[Contrast], arm: str, is_open: bool) -> Contrast | None:
    """The contrast of the primary metric of one arm."""
    return next((c for c in found if c.arm == arm and c.figure.metric is primary(is_open)), None)


def more_blocks(found: Sequence[Contrast], is_open: bool) -> int:
    """How many more blocks the primary metric of every arm needs for a verdict."""
    deciding = [c.verdict for c in found if c.figure.metric is primary(is_open) and c.verdict]
    return max((j.num_missing for j in deciding), default=0)


def in_words(found: Sequence[Contrast], arm: str) -> str:
    """As: better in output tok/s (4.00x), TTFT p50 (0.20x); can't tell in TTFT p95 (need 12 more blocks)."""
    order = ("better in", "worse in", "equivalent", "can't tell in", "too few samples for")
    parts: dict[str, list[str]] = {kind: [] for kind in order}
    for contrast in found:
        name, verdict = contrast.figure.label, contrast.verdict
        if contrast.arm != arm:
            continue
        if verdict is None:
            parts["too few samples for"].append(name)
        elif verdict.word == "can't tell":
            parts["can't tell in"].append(f"{name} (need {verdict.missing_text()} more blocks)")
        elif verdict.word == "equivalent":
            first = "" if parts["equivalent"] else f"within {verdict.margin:.0%} in "
            parts["equivalent"].append(first + name)
        else:
            parts[f"{verdict.word} in"].append(f"{name} ({ratio_text(verdict.ratio)})")
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in parts.items() if names)
