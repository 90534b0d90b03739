"""The verdict in words: what an arm gives and what it costs, and which arm, if any, is best.

An arm wins only if no other arm is surely better in any metric that decides. Which price is worth paying is
the reader's choice: an objective makes one figure decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd

from adapters.base import ConfigError
from harness.comparing.contrasts import (
    Blocks,
    Contrast,
    Design,
    asking,
    contrasts,
    most_asking,
    primary,
    ratio_text,
)
from harness.comparing.verdict import CONFIDENCE
from harness.results.formulas import throughput
from harness.results.manifest import Validity
from harness.results.metrics import OUTPUT_TOKENS, TPOT, TTFT, Figure, Metric, deciding_figures, with_chosen
from harness.results.slo import Slo, goodput
from harness.results.table import counted, duration_text

ObjectiveName = Literal["throughput", "ttft", "tpot", "goodput"]
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)


def objective_figure(name: ObjectiveName, slo: Slo) -> Figure:
    """The figure that decides.

    Raises:
        ConfigError: goodput, and no limit says what counts as good.
    """
    if name != "goodput":
        plain = {"throughput": Figure(OUTPUT_TOKENS), "ttft": Figure(TTFT, 50), "tpot": Figure(TPOT, 50)}
        return plain[name]
    limits = slo.on_each_request
    if not limits:
        raise ConfigError("--objective goodput needs limits on each request: --slo ttft_ms=500,tpot_ms=50")

    def good(rows: pd.DataFrame, is_open: bool) -> float | None:
        rate = throughput(rows, is_open=is_open)
        return goodput(rows, limits, rate.window_s).requests_per_s if rate else None

    return Figure(
        Metric(
            name="goodput", unit="per_s", label="goodput", of_run=good, higher_is_better=True, digits=2,
            description=f"Requests a second that meet {limits.text()}.",
        )
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """Which arm comes first by the figure that decides, and what speaks against it."""

    first: str
    second: str
    figure: Figure
    is_chosen: bool
    """Whether the reader chose the figure."""
    against_next: list[Contrast]
    """`first` against `second`."""
    against_reference: list[Contrast]
    better_elsewhere: list[Contrast]
    """Where another arm is surely better than `first`."""

    @property
    def lead(self) -> Contrast:
        return next(c for c in self.against_next if c.figure == self.figure)

    @property
    def winner(self) -> str | None:
        is_sure = self.lead.word == "better"
        return self.first if is_sure and (self.is_chosen or not self.better_elsewhere) else None


def judge(
    rows: pd.DataFrame,
    arms: Sequence[str],
    reference: str,
    *,
    is_open: bool,
    margin: float,
    design: Design,
    objective: Figure | None = None,
) -> tuple[list[Contrast], Decision | None]:
    """Every arm against the reference, and which is best; None where there is nothing to choose between."""
    blocks = Blocks(rows)
    judged = with_chosen(deciding_figures(), objective)

    def against(other: str) -> list[Contrast]:
        return contrasts(blocks, arms, other, is_open=is_open, margin=margin, design=design, figures=judged)

    found = against(reference)
    figure = objective or Figure(primary(is_open))
    ranked = _ranked(rows, arms, figure, is_open)
    if len(ranked) < 2:
        return found, None
    first, second = ranked[:2]
    return found, Decision(
        first,
        second,
        figure,
        objective is not None,
        [c for c in against(second) if c.arm == first],
        [c for c in found if c.arm == first],
        [c for c in against(first) if c.word == "better"],
    )


def _ranked(rows: pd.DataFrame, arms: Sequence[str], figure: Figure, is_open: bool) -> list[str]:
    """Arms with a value, the best first: by the median of their blocks."""
    values: dict[str, float] = {}
    for arm in arms:
        blocks = [part for _, part in rows[rows["arm"] == arm].groupby("repeat")]
        each = [v for part in blocks if (v := figure.value(part, is_open, len(blocks))) is not None]
        if each:
            values[arm] = float(np.median(each)) * (-1 if figure.metric.higher_is_better else 1)
    return sorted(values, key=values.__getitem__)


def nothing_decided(validity: Validity) -> str:
    """The answer where runs are INVALID."""
    reason = validity.invalid[0].partition(";")[0]
    return f"Nothing is decided: the runs are INVALID ({reason}), so this does not count."


def decision_sentences(made: Decision, reference: str, is_open: bool, block_s: float | None) -> list[str]:
    """First what the first arm gives and costs, then how it stands to the next, then how sure that is."""
    lead, told = made.lead, made.against_reference or made.against_next
    other = reference if made.against_reference else made.second
    label = made.figure.label
    if lead.verdict is None:
        return [f"{made.first} comes first in {label}, but too few answers stand behind it."]
    sentences: list[str] = []
    standing = f"{lead.text()} the {label} of the next, {made.second}"
    trade = trade_text(told, made.first)
    if made.winner and not made.better_elsewhere:
        sentences.append(f"{made.first} wins: {standing}.")
        if trade:
            sentences.append(f"Against {other}: {trade}.")
    else:
        sentences.append(
            f"{made.first} against {other}: {trade}." if trade else _undecided(made, told, other)
        )
        if made.winner:
            sentences.append(f"By {label}, which was chosen to decide, {made.first} wins: {standing}.")
        elif lead.word == "better":
            sentences.append(f"It comes first in {label}: {standing}.")
        elif lead.word != "equivalent":
            ahead = sum((log > 0) == made.figure.metric.higher_is_better for log in lead.log_ratios)
            sentences.append(
                f"{made.first} leads, but is not surely ahead: {standing}, and better in "
                f"{ahead} of {counted(len(lead.log_ratios), 'block')}."
            )
        if made.better_elsewhere:
            sentences.append(_not_the_best(made))
    verdict = lead.verdict
    over = f"over {counted(verdict.num_blocks, 'block')}, the same requests paired"
    if lead.word == "better":
        held = f"{verdict.confidence:.1%}" if verdict.confidence < 0.9995 else "more than 99.9%"
        sentences.append(f"How sure: the interval holds at {held} {over}.")
    else:
        ask = _asked(made.against_next, is_open, block_s)
        word = "can't tell" if ask else verdict.text()
        if trade and other != made.second:
            sentences.append(f"How sure: what is said against {other} holds at {CONFIDENCE:.0%} {over}.")
            word = f"{made.first} against {made.second}: {word}"
        else:
            word = f"How sure: {word} {over}"
        sentences.append(f"{word}{ask and f'; {ask}'}.")
    untold = [
        c.figure.label for c in told if c.arm == made.first and (c.verdict is None or c.word == "can't tell")
    ]
    if made.winner and untold:
        sentences.append(f"Nothing is sure of {', '.join(untold)}.")
    return sentences


def next_step(made: Decision, num_blocks: int, is_open: bool, *, is_of_files: bool) -> str:
    """What a reader can do with this answer. `is_of_files`: blocks are repeats of runs made singly."""
    if made.winner:
        return f"serve with {made.winner}; another load, model or machine needs a comparison of its own."
    if made.lead.word == "better":
        others = ", ".join(dict.fromkeys(c.arm for c in made.better_elsewhere))
        return f"take {made.first} if {made.figure.label} counts most, and {others} if its price counts more."
    if made.lead.word == "equivalent":
        return f"take whichever of {made.first} and {made.second} is simpler to run."
    if verdict := most_asking(made.against_next, is_open):
        more = num_blocks + verdict.num_missing
        how = f"runs of REPEATS={more}" if is_of_files else f"the same command with --resume --blocks {more}"
        return f"measure on: {how}."
    return "take either: what is left between them is small, or too noisy for any number of blocks."


def _undecided(made: Decision, told: Sequence[Contrast], other: str) -> str:
    words = {contrast.word for contrast in told if contrast.verdict}
    if words == {"equivalent"} and made.lead.verdict:
        judged = "" if all(contrast.verdict for contrast in told) else " that enough answers stand behind"
        return f"{made.first} and {other} are {made.lead.verdict.text()}, in every figure{judged}."
    if made.lead.word == "equivalent" and made.lead.verdict:
        labels = ", ".join(c.figure.label for c in told if c.word == "equivalent")
        return (
            f"{made.first} and {other} are {made.lead.verdict.text()} in {labels}; "
            "of other figures nothing is sure."
        )
    return f"Can't tell {made.first} from {other}: no difference is sure."


def _not_the_best(made: Decision) -> str:
    better: dict[str, list[str]] = {}
    for contrast in made.better_elsewhere:
        better.setdefault(contrast.figure.label, []).append(contrast.arm)
    named = "; ".join(f"{', '.join(arms)} in {label}" for label, arms in better.items())
    choose = "" if made.is_chosen else f" --objective {'|'.join(OBJECTIVES)} lets one figure decide."
    return f"Surely better than {made.first}: {named}.{choose}"


def _asked(found: Sequence[Contrast], is_open: bool, block_s: float | None) -> str:
    verdict = most_asking(found, is_open)
    return f"it takes {verdict.asked_text()}{_takes(verdict.num_missing, block_s)} to tell" if verdict else ""


def _takes(num_blocks: int, block_s: float | None) -> str:
    """As ` (about 12 min)`; nothing where nobody knows how long a block takes."""
    return "" if block_s is None else f" (about {duration_text(num_blocks * block_s)})"


def trade_text(found: Sequence[Contrast], arm: str) -> str:
    """As: 3.69x the tokens, TTFT 77x sooner; each token 4.2x later. Of each aspect the first sure figure."""
    gains: dict[str, str] = {}
    costs: dict[str, str] = {}
    for contrast in found:
        metric = contrast.figure.metric
        aspect = metric.aspect or metric.label
        if contrast.arm == arm and contrast.word in ("better", "worse"):
            side = gains if contrast.word == "better" else costs
            side.setdefault(aspect, phrase_of(contrast))
    return "; ".join(", ".join(side.values()) for side in (gains, costs) if side)


def phrase_of(contrast: Contrast) -> str:
    """Of a contrast with a verdict, as: TTFT 77x sooner."""
    metric, verdict = contrast.figure.metric, contrast.verdict
    assert verdict is not None
    better, worse = metric.phrase
    if metric.higher_is_better:
        factor, plain = ratio_text(verdict.ratio), "{} the " + contrast.figure.label
    else:
        factor = factor_text(max(verdict.ratio, 1 / verdict.ratio))
        plain = contrast.figure.label + " {} " + ("lower" if verdict.ratio < 1 else "higher")
    template = better if verdict.word == "better" else worse
    is_first = contrast.figure.q == metric.compared[0] if metric.compared else False
    return (template if is_first and template else plain).format(factor)


def factor_text(factor: float) -> str:
    return f"{factor:.0f}x" if factor >= 10 else f"{factor:.2f}x"


def in_words(found: Sequence[Contrast], arm: str) -> str:
    """As: better in output tok/s (4.00x); worse in TPOT p50 (4.20x); can't tell in TTFT p95 (need 12 more
    blocks)."""
    order = ("better in", "worse in", "equivalent", "can't tell in", "too few samples for")
    parts: dict[str, list[str]] = {kind: [] for kind in order}
    for contrast in found:
        name, verdict = contrast.figure.label, contrast.verdict
        if contrast.arm != arm:
            continue
        if verdict is None:
            parts["too few samples for"].append(name)
        elif verdict.word == "can't tell":
            parts["can't tell in"].append(f"{name} ({verdict.missing_text()})")
        elif verdict.word == "equivalent":
            first = "" if parts["equivalent"] else f"within {verdict.margin:.0%} in "
            parts["equivalent"].append(first + name)
        else:
            parts[f"{verdict.word} in"].append(f"{name} ({ratio_text(verdict.ratio)})")
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in parts.items() if names)


def what_more_blocks_tell(
    found: Sequence[Contrast], is_open: bool, block_s: float | None, option: str
) -> list[str]:
    """Advice that somebody can follow: how many blocks, how long they take, and which figures they settle.
    `option` makes more of them."""
    verdict = most_asking(found, is_open)
    if verdict is None:
        return []
    names = " and ".join(dict.fromkeys(c.figure.label for c in asking(found, is_open)))
    takes = _takes(verdict.num_missing, block_s)
    return [f"It takes {verdict.asked_text()}{takes} to decide {names} ({option})."]
