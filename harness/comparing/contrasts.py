"""What the blocks of a comparison say about each deciding metric: one `Contrast` for each arm and figure.

Within a block the same planned request is taken under both arms, and only if both answered it. Each block
gives one logarithm of a ratio; what a run's place in its block does is taken out; `verdict` judges the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from harness.comparing.intervals import FEWEST_BLOCKS, Ordered, without_order
from harness.comparing.verdict import DEFAULT_MARGIN, Verdict, judge_ratio
from harness.results.manifest import RunManifest
from harness.results.metrics import OUTPUT_TOKENS, REQUEST_TIME, TPOT, Figure, Metric, deciding_figures


@dataclass(frozen=True, slots=True)
class Design:
    """How the blocks were measured."""

    places: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """Of the run of an arm in a block: how many runs of that block were made before it."""
    first_look: int = FEWEST_BLOCKS
    """Blocks that were planned at first: nobody looked at fewer."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """One figure of `arm` against `reference`; `verdict` None where no block has both values."""

    arm: str
    reference: str
    figure: Figure
    verdict: Verdict | None
    log_ratios: tuple[float, ...]
    """One a block, without the drift within a block."""

    def text(self) -> str:
        """As 4.00x [3.90-4.10]; the bare ratio where one block is all there is."""
        found = self.verdict
        if found is None:
            return "n too small"
        return f"{ratio_text(found.ratio)}" + (f" [{found.interval_text()}]" if found.interval else "")

    @property
    def word(self) -> str:
        return self.verdict.word if self.verdict else "too few samples"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"


def primary(is_open: bool) -> Metric:
    """What arms are ranked by: an open loop delivers its rate under every arm that keeps up."""
    return REQUEST_TIME if is_open else OUTPUT_TOKENS


def leading_figures(is_open: bool) -> list[Figure]:
    """What the blocks that are asked for decide: the primary metric, and the price of it for each token."""
    return [Figure(primary(is_open)), Figure(TPOT, 50)]


def error_share(figure: Figure, is_open: bool, num_judged: int) -> float:
    """A quarter of the allowed error is for each leading figure, the others share the rest."""
    return 0.25 if figure in leading_figures(is_open) else 0.5 / max(1, num_judged - 2)


def design_of(runs: Sequence[RunManifest]) -> Design:
    """Without places where the runs do not tell in which order a block measured them."""
    planned = min((run.schedule.num_blocks for run in runs), default=FEWEST_BLOCKS)
    return Design(_places(runs), max(FEWEST_BLOCKS, planned))


def _places(runs: Iterable[RunManifest]) -> dict[tuple[str, int], int]:
    blocks: dict[int, list[tuple[str, str]]] = {}
    for run in runs:
        for repeat in run.planned_repeats if len(run.planned_repeats) == 1 else ():
            blocks.setdefault(repeat, []).append((run.started_at, run.arm))
    places: dict[tuple[str, int], int] = {}
    for block, started in blocks.items():
        if len({at for at, _ in started}) < len(started):
            return {}
        places |= {(arm, block): place for place, (_, arm) in enumerate(sorted(started))}
    return places


class Blocks:
    """The answered requests of each arm and block. A figure of a part is worked out once: an arm is compared
    with several others, and nearly always all of its requests are."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._parts = {
            (str(arm), int(str(block))): part[
                part["error"].isna() & part["total_sched_ms"].notna()
            ].set_index("schedule_index")
            for (arm, block), part in rows.groupby(["arm", "repeat"])
        }
        self._pairs: dict[tuple[str, str], dict[int, tuple[pd.DataFrame, pd.DataFrame]]] = {}
        self._values: dict[tuple[Figure, int, bool, int], float | None] = {}

    def pairs(self, arm: str, reference: str) -> dict[int, tuple[pd.DataFrame, pd.DataFrame]]:
        """By block, the same planned requests under both arms, without those that got no token in either."""
        if (arm, reference) not in self._pairs:
            self._pairs[arm, reference] = {
                block: _common(ours, self._parts[reference, block])
                for (name, block), ours in self._parts.items()
                if name == arm and (reference, block) in self._parts
            }
        return self._pairs[arm, reference]

    def value(self, figure: Figure, part: pd.DataFrame, is_open: bool, num_blocks: int) -> float | None:
        """Of one of the frames of `pairs`, which all live as long as this does."""
        key = (figure, id(part), is_open, num_blocks)
        if key not in self._values:
            self._values[key] = figure.value(part, is_open, num_blocks)
        return self._values[key]


def _common(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    if set(ours.index) == set(theirs.index):
        return ours, theirs
    common = ours.index.intersection(theirs.index)
    return ours.loc[common], theirs.loc[common]


def contrasts(
    rows: pd.DataFrame | Blocks,
    arms: Sequence[str],
    reference: str,
    *,
    is_open: bool,
    margin: float = DEFAULT_MARGIN,
    figures: Sequence[Figure] | None = None,
    design: Design | None = None,
) -> list[Contrast]:
    """Every arm but the reference, each with all deciding figures (or with `figures`).

    The intervals of all deciding figures hold together for one arm. `Blocks` serve several calls.
    """
    design = design or Design()
    of_rows = rows if isinstance(rows, Blocks) else Blocks(rows)
    deciding = deciding_figures()
    judged = deciding if figures is None else figures
    num_judged = max(len(deciding), len(judged))
    found: dict[tuple[str, Figure], Contrast] = {}
    others = [arm for arm in arms if arm != reference]
    pairs = {arm: of_rows.pairs(arm, reference) for arm in others}
    for figure in judged:
        logs = {
            arm: {
                block: log
                for block, pair in of_block.items()
                if (log := _log_ratio([of_rows.value(figure, p, is_open, len(of_block)) for p in pair]))
                is not None
            }
            for arm, of_block in pairs.items()
        }
        for arm, ordered in _in_order(logs, reference, design.places).items():
            verdict = None
            if ordered.logs.size:
                verdict = judge_ratio(
                    ordered.logs.tolist(),
                    higher_is_better=figure.metric.higher_is_better,
                    error_share=error_share(figure, is_open, num_judged),
                    margin=margin,
                    extra_variance=float(ordered.extra_variance),
                    lost_degrees=ordered.lost_degrees,
                    first_look=design.first_look,
                )
            found[arm, figure] = Contrast(arm, reference, figure, verdict, tuple(ordered.logs.tolist()))
    return [found[arm, figure] for arm in others for figure in judged]


def _in_order(
    logs: Mapping[str, Mapping[int, float]], reference: str, places: Mapping[tuple[str, int], int]
) -> dict[str, Ordered]:
    """The logarithms of each arm, without drift within blocks where all blocks have all arms and places."""
    plain = {arm: Ordered(np.array(list(own.values())), np.zeros(()), 0) for arm, own in logs.items()}
    blocks = sorted({block for own in logs.values() for block in own})
    names = [reference, *logs]
    is_whole = all(len(own) == len(blocks) for own in logs.values())
    if not blocks or not is_whole or any((arm, b) not in places for arm in names for b in blocks):
        return plain
    values = np.array([[0.0] * len(blocks), *([own[b] for b in blocks] for own in logs.values())])
    at = np.array([[places[arm, b] for b in blocks] for arm in names])
    ordered = without_order(values, at, 0)
    return {
        arm: Ordered(ordered.logs[row], ordered.extra_variance[row], ordered.lost_degrees)
        for row, arm in enumerate(names)
        if row
    }


def _log_ratio(pair: Sequence[float | None]) -> float | None:
    ours, theirs = pair
    return math.log(ours / theirs) if ours and theirs else None


def contrast_table(found: Sequence[Contrast]) -> tuple[list[str], list[list[str]]]:
    """Headers, and one line an arm."""
    arms = list(dict.fromkeys(contrast.arm for contrast in found))
    labels = list(dict.fromkeys(contrast.figure.label for contrast in found))
    return ["arm", *labels], [[arm, *(c.text() for c in found if c.arm == arm)] for arm in arms]


def asking(found: Sequence[Contrast], is_open: bool) -> list[Contrast]:
    """Those that more blocks are asked for: of the leading figures, and of one chosen beside the usual."""
    usual = deciding_figures()
    leading = leading_figures(is_open)
    return [c for c in found if c.figure in leading or c.figure not in usual]


def most_asking(found: Sequence[Contrast], is_open: bool) -> Verdict | None:
    """Over all arms, of the figures that blocks are asked for, the one that needs most for a verdict. Those
    out of reach aside; None where nothing is missing."""
    verdicts = [c.verdict for c in asking(found, is_open) if c.verdict]
    missing = [v for v in verdicts if v.num_missing and not v.is_out_of_reach]
    return max(missing, key=lambda verdict: verdict.num_missing, default=None)
