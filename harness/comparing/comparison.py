"""What several arms, measured in interleaved blocks, say about each other: the text of `lab compare`.

The table shows the figures of the page: percentiles over all requests of an arm, rates as medians of blocks.
Only metrics that decide get a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median

import pandas as pd

from adapters.text.unicode_text import printable
from harness.comparing.combine import draws_text, unranked_text
from harness.comparing.contrasts import Contrast, contrast_table, design_of
from harness.comparing.trade import (
    Decision,
    decision_sentences,
    in_words,
    judge,
    next_step,
    nothing_decided,
    what_more_blocks_tell,
)
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.plan.load import load_words
from harness.results.lengths import length_table, lengths_in_words, lengths_of
from harness.results.manifest import ComparisonManifest
from harness.results.metrics import Figure, compared_figures, with_chosen
from harness.results.stats import MIN_SAMPLES, mean_of
from harness.results.steady import FIGURES as STEADY_FIGURES
from harness.results.steady import SteadyFigures, never_steady, steady_figures
from harness.results.table import MISSING, counted, number, render_table, share


@dataclass(frozen=True, slots=True)
class BlockFigures:
    """One arm in one block."""

    arm: str
    block: int
    values: dict[str, float | None]
    """By key of the figure, as `ttft_p50_ms`; None where too few samples stand behind it."""
    mean_batch_size: float | None
    dead_row_share: float | None
    num_same: int
    """Prompts whose output is that of the reference arm in the same block."""
    num_compared: int


def compare_arms(rows: pd.DataFrame, manifest: ComparisonManifest) -> list[BlockFigures]:
    """Figures of every run, in the order of the manifest's arms and then of blocks."""
    figures: list[BlockFigures] = []
    entries = {(run.arm, entry.repeat): entry for run in manifest.runs for entry in run.repeats}
    is_open = manifest.runs[0].schedule.load.is_open
    for arm in manifest.arms:
        num_blocks = rows[rows["arm"] == arm]["repeat"].nunique()
        for block in sorted(rows["repeat"].unique()):
            part = rows[(rows["arm"] == arm) & (rows["repeat"] == block)]
            if part.empty:
                continue
            reference = rows[(rows["arm"] == manifest.reference) & (rows["repeat"] == block)]
            entry = entries.get((arm, int(block)))
            figures.append(
                BlockFigures(
                    arm,
                    int(block),
                    {f.key: f.value(part, is_open, num_blocks) for f in compared_figures()},
                    entry.mean_batch_size if entry else None,
                    entry.steps.dead_row_share if entry and entry.steps else None,
                    *agreement(part, reference),
                )
            )
    return figures


def agreement(part: pd.DataFrame, reference: pd.DataFrame) -> tuple[int, int]:
    """How many planned requests got the same tokens in both, and how many were planned.

    A request that failed on either side does not agree. Without token ids the texts are compared.
    """
    has_ids = part["output_sha256"].notna().any() and reference["output_sha256"].notna().any()
    column = "output_sha256" if has_ids else "text_sha256"
    both = part.set_index("schedule_index")[column].to_frame("ours")
    both = both.join(reference.set_index("schedule_index")[column].rename("theirs"), how="outer")
    return int((both["ours"].notna() & (both["ours"] == both["theirs"])).sum()), len(both)


def agreement_of_all(rows: pd.DataFrame) -> tuple[int, int]:
    """How many planned requests got one and the same answer in every run, and how many were planned."""
    column = "output_sha256" if rows["output_sha256"].notna().any() else "text_sha256"
    # Under one number, blocks with draws of their own planned other requests.
    planned = ["schedule_index", "prompt_id", "seed"]
    num_arms = rows.groupby("repeat")["arm"].nunique()
    blocks = rows[[*planned, "repeat"]].drop_duplicates()
    num_runs = blocks.assign(num=blocks["repeat"].map(num_arms)).groupby(planned)["num"].sum()
    per_request = rows.groupby(planned)[column]
    same = (per_request.nunique() == 1) & (per_request.count() == num_runs)
    return int(same.sum()), len(same)


def answer_sentences(
    manifest: ComparisonManifest, made: Decision | None, unsteady: Sequence[str]
) -> list[str]:
    """What a comparison says first, in terminal and report: the answer, how sure it is, what it holds for,
    and what to do next. `unsteady`: arms that never had the load asked for."""
    if manifest.validity.invalid:
        return [nothing_decided(manifest.validity), "Next: remove the cause, then measure again."]
    if unranked := unranked_text(manifest.runs):
        return [unranked]
    is_open = manifest.runs[0].schedule.load.is_open
    told = decision_sentences(made, manifest.reference, is_open, block_seconds(manifest)) if made else []
    if manifest.num_blocks > 1:
        told.append(draws_text(manifest.runs))
    told += never_steady(unsteady)
    if any(run.service and run.service.backend == "null" for run in manifest.runs):
        told.append("The null backend computes no model: this tells of scheduling, not of any model's speed.")
    if made:
        step = next_step(made, manifest.num_blocks, is_open, is_of_files=_is_of_files(manifest))
        told.append(f"Next: {step}")
    return told


def _is_of_files(manifest: ComparisonManifest) -> bool:
    return len({run.file for run in manifest.runs}) > 1


def unanswered_text(rows: pd.DataFrame) -> str:
    """As ` (81 got none from some arm)`; empty where every arm answered everything."""
    num_failed = len(rows.loc[rows["error"].notna(), ["repeat", "schedule_index"]].drop_duplicates())
    return f" ({num_failed} got no answer from some arm)" if num_failed else ""


def render_comparison(
    rows: pd.DataFrame,
    manifest: ComparisonManifest,
    margin: float = DEFAULT_MARGIN,
    objective: Figure | None = None,
) -> str:
    """The text of a comparison: the verdict, figures, ratios with intervals, validity.

    `objective` decides which arm is best; without it none is that is surely worse in something.
    """
    figures, reference = compare_arms(rows, manifest), manifest.reference
    is_open = manifest.runs[0].schedule.load.is_open
    design, block_s = design_of(manifest.runs), block_seconds(manifest)
    found, made = judge(
        rows, manifest.arms, reference, is_open=is_open, margin=margin, design=design, objective=objective
    )
    # A block of several files is one repeat of each.
    more_blocks = "REPEATS of each run" if _is_of_files(manifest) else "--blocks"
    num_same, num_planned = agreement_of_all(rows)
    load = manifest.runs[0].schedule.load
    steady = {arm: steady_figures(rows[rows["arm"] == arm], load) for arm in manifest.arms}
    unsteady = [arm for arm, of in steady.items() if of is None]
    told: list[str] = []
    if not manifest.validity.invalid:
        told = [*verdict_lines(found), *what_more_blocks_tell(found, is_open, block_s, more_blocks)]
    return "\n".join(
        [
            _heading(manifest),
            "",
            *map(printable, answer_sentences(manifest, made, unsteady)),
            "",
            _figure_table(rows, is_open, figures, manifest.arms, reference, objective),
            "",
            RANKS_TEXT,
            "",
            render_table(*interval_table(_rank_intervals(rows, manifest.arms))),
            "",
            "Where load is as asked, without start-up and end (medians over blocks):",
            "",
            _steady_table(steady, reference),
            "",
            printable(f"Ratios to {reference}, the same requests paired; ")
            + "the 95% intervals of an arm allow for all its figures.",
            "",
            render_table(*contrast_table(found)),
            "",
            RATIOS_TEXT,
            *map(printable, told),
            "",
            f"All arms gave the same output for {num_same} of {num_planned} prompts{unanswered_text(rows)}.",
            *padding_lines(manifest),
            *manifest.validity.lines(),
            *_natural_lengths(rows, manifest, num_planned - num_same),
        ]
    )


def padding_lines(manifest: ComparisonManifest) -> list[str]:
    """What the arms with dead rows are, where there are any: less than the stacks they stand for."""
    strategies = [run.service.strategy for run in manifest.runs if run.service]
    styles = {of.get("pad_style", "lean") for of in strategies if of.get("pad_finished")}
    told = {
        "lean": "Padded arms keep finished rows until their batch is done. In the rest they are kinder than "
        "padded generate(): prompts are not padded and run in chunks beside decode, dead rows do not grow, "
        "and answers end singly.",
        "generate": "Arms with PAD_STYLE=generate compute what padded generate() does: all prompts, padded "
        "to the longest of their batch, before the first decode step, and finished rows that grow. They are "
        "kinder in two things: rows do not attend to padding, and answers end singly.",
    }
    return [words for style, words in told.items() if style in styles]


def _natural_lengths(rows: pd.DataFrame, manifest: ComparisonManifest, num_unlike: int) -> list[str]:
    if all(run.settings.ignore_eos for run in manifest.runs):
        return []
    lines = [f"Lengths are the model's own: {lengths_in_words(rows)}."]
    if num_unlike:
        lines.append(f"  caution: {unlike_work(num_unlike)}")
    own = {arm: lengths_of(rows[rows["arm"] == arm]) for arm in manifest.arms}
    return [*lines, "", render_table(*length_table(own))]


def unlike_work(num_unlike: int) -> str:
    """Where the model ends its answers, arms that differ in their tokens differ in their work as well."""
    return (
        f"{num_unlike} prompts did not get the same tokens in every arm, so the arms' answers "
        "differ in length: throughput and total geomean compare unlike work"
    )


def verdict_lines(found: Sequence[Contrast]) -> list[str]:
    """One line an arm, then what is missing where requests were too few."""
    arms = dict.fromkeys(contrast.arm for contrast in found)
    lines = [f"{arm}: {in_words(found, arm)}" for arm in arms]
    too_few = {contrast.figure.q for contrast in found if contrast.verdict is None}
    if missing := [q for q in MIN_SAMPLES if q in too_few]:
        needs = ", ".join(f"a ratio of p{q} needs {MIN_SAMPLES[q]}" for q in missing)
        lines.append(f"Too few requests in a block (of gaps: in all blocks): {needs}")
    return lines


def block_seconds(manifest: ComparisonManifest) -> float | None:
    """How long one block of all arms takes, by the clock of its runs; None where they do not tell. What lies
    between two runs (a service that ends and one that starts, the runs of other loads) belongs to a run."""
    each: dict[str, list[float]] = {}
    spans = []
    for run in manifest.runs:
        if run.repeats:
            start, end = (datetime.fromisoformat(at) for at in (run.started_at, run.repeats[-1].ended_at))
            each.setdefault(run.arm, []).append((end - start).total_seconds() / len(run.repeats))
            spans.append((start, end))
    spans.sort()
    between = [(later[0] - sooner[1]).total_seconds() for sooner, later in pairwise(spans)]
    # Of files and repeats of several services that were not measured one after another it says nothing.
    gap_s = max(0.0, median(between)) if between else 0.0
    return sum(median(seconds) + gap_s for seconds in each.values()) or None


def _heading(manifest: ComparisonManifest) -> str:
    first = manifest.runs[0]
    plan, host = first.schedule, first.host
    users = load_words(plan.rate, plan.concurrency)
    capacity = first.settings.capacity
    if plan.rate and capacity:
        users += f" ({plan.rate / capacity:.0%} of {manifest.reference}'s capacity of {capacity:g})"
    return (
        f"{counted(manifest.num_blocks, 'block')} of {plan.num_requests} requests, {users}, "
        f"seed {first.settings.seed} - {printable(f'{first.model}, {first.engine_text}')}\n"
        f"{printable(str(host.cpu_model))}, {host.physical_cores} cores. TTFT and total are from schedule."
    )


def _figure_table(
    rows: pd.DataFrame,
    is_open: bool,
    figures: Sequence[BlockFigures],
    arms: Sequence[str],
    reference: str,
    objective: Figure | None,
) -> str:
    columns = with_chosen(compared_figures(), objective)
    lines: list[list[str]] = []
    for arm in arms:
        own = [f for f in figures if f.arm == arm]
        of_arm = rows[rows["arm"] == arm]
        cells = [_cell(figure, figure.over(of_arm, is_open)) for figure in columns]
        batch = number(mean_of([f.mean_batch_size for f in own]), 2)
        same = min((f.num_same for f in own), default=0)
        compared = max((f.num_compared for f in own), default=0)
        lines.append(
            [arm, *cells, batch, share(mean_of([f.dead_row_share for f in own])), f"{same}/{compared}"]
        )
    return render_table(
        ["arm", *map(_with_unit, columns), "mean batch", "dead rows", f"same as {reference}"], lines
    )


RATIOS_TEXT = (
    "A ratio is the mean over blocks of what two arms did in one block; the tables above take all requests "
    "of an arm together, so that their quotients differ a little."
)
RANKS_TEXT = "Intervals of these percentiles by ranks over all requests of an arm, each end at 95%:"


def interval_table(
    intervals: Mapping[str, Mapping[str, tuple[float, float] | None]],
) -> tuple[list[str], list[list[str]]]:
    """Headers, and one line an arm, of the percentiles that comparisons show; `intervals` by their keys."""
    figures = [figure for figure in compared_figures() if figure.q is not None]
    lines = [[arm, *(f.interval_text(own[f.key]) for f in figures)] for arm, own in intervals.items()]
    return ["intervals by ranks", *(_with_unit(figure) for figure in figures)], lines


def _rank_intervals(
    rows: pd.DataFrame, arms: Sequence[str]
) -> dict[str, dict[str, tuple[float, float] | None]]:
    own = {arm: rows[rows["arm"] == arm] for arm in arms}
    return {arm: {f.key: f.interval(of_arm) for f in compared_figures()} for arm, of_arm in own.items()}


def _with_unit(figure: Figure) -> str:
    return figure.label + (" (ms)" if figure.metric.unit == "ms" else "")


def _steady_table(found: Mapping[str, SteadyFigures | None], reference_name: str) -> str:
    reference = found.get(reference_name)
    lines: list[list[str]] = []
    for arm, of in found.items():
        if of is None:
            lines.append([arm, "none", *[MISSING] * (3 + len(STEADY_FIGURES))])
            continue
        ratio = (
            of.output_tokens_per_s / reference.output_tokens_per_s
            if reference and reference.output_tokens_per_s
            else None
        )
        latencies = (_cell(figure, v) for figure, v in zip(STEADY_FIGURES, of.latencies, strict=True))
        rate = number(of.output_tokens_per_s, 1)
        lines.append([arm, share(of.share), str(of.num_requests), rate, number(ratio, 2), *latencies])
    names = [f"{figure.label} (ms)" for figure in STEADY_FIGURES]
    headers = ["steady window", "of the time", "answers", "output tok/s", f"to {reference_name}", *names]
    return render_table(headers, lines)


def _cell(figure: Figure, value: float | None) -> str:
    # Tenths of a millisecond differ from block to block; they tell something of short times only.
    is_coarse = figure.metric.unit == "ms" and value is not None and value >= 10
    return number(value, 0) if is_coarse else figure.text(value)
