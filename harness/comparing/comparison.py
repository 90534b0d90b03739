"""What several arms, measured in interleaved blocks, say about each other.

What enters are all rows and a manifest that holds one manifest per run; what leaves are figures per arm
and block, the verdicts on each arm, and the share of outputs that agree token for token.
Starts nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import pandas as pd

from harness.comparing.headline import HEADLINES, Contrast, contrasts, in_words, more_blocks, primary
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.results.manifest import ComparisonManifest, StepSummary
from harness.results.metrics import throughput
from harness.results.stats import MIN_SAMPLES, percentile
from harness.results.table import number, render_table, share

Value = Callable[["BlockFigures"], float | None]


@dataclass(frozen=True, slots=True)
class BlockFigures:
    """One arm in one block; None where too few samples stand behind a figure."""

    arm: str
    block: int
    output_tokens_per_s: float | None
    ttft_sched_p50_ms: float | None
    ttft_sched_p95_ms: float | None
    total_sched_p95_ms: float | None
    mean_batch_size: float | None
    dead_row_share: float | None
    num_same: int
    """Prompts whose output is that of the reference arm in the same block."""
    num_compared: int


COLUMNS: tuple[tuple[str, Value, int], ...] = (
    ("output tok/s", lambda f: f.output_tokens_per_s, 1),
    ("TTFT p50 (ms)", lambda f: f.ttft_sched_p50_ms, 0),
    ("TTFT p95 (ms)", lambda f: f.ttft_sched_p95_ms, 0),
    ("total p95 (ms)", lambda f: f.total_sched_p95_ms, 0),
)


def compare_arms(rows: pd.DataFrame, manifest: ComparisonManifest) -> list[BlockFigures]:
    """Figures of every run, in the order of the manifest's arms and then of blocks."""
    figures: list[BlockFigures] = []
    steps = {(run.arm, entry.repeat): entry.steps for run in manifest.runs for entry in run.repeats}
    is_open = manifest.runs[0].schedule.load.is_open
    for arm in manifest.arms:
        for block in sorted(rows["repeat"].unique()):
            part = rows[(rows["arm"] == arm) & (rows["repeat"] == block)]
            if part.empty:
                continue
            reference = rows[(rows["arm"] == manifest.reference) & (rows["repeat"] == block)]
            figures.append(_figures(arm, int(block), part, reference, steps.get((arm, int(block))), is_open))
    return figures


def _figures(
    arm: str,
    block: int,
    part: pd.DataFrame,
    reference: pd.DataFrame,
    steps: StepSummary | None,
    is_open: bool,
) -> BlockFigures:
    done = part[part["error"].isna()]
    rate = throughput(part, is_open=is_open)
    num_same, num_compared = agreement(part, reference)
    ttft_ms, total_ms = (done[name].to_numpy(dtype=float) for name in ("ttft_sched_ms", "total_sched_ms"))
    return BlockFigures(
        arm=arm,
        block=block,
        output_tokens_per_s=rate.output_tokens_per_s if rate else None,
        ttft_sched_p50_ms=percentile(ttft_ms, 50).value,
        ttft_sched_p95_ms=percentile(ttft_ms, 95).value,
        total_sched_p95_ms=percentile(total_ms, 95).value,
        mean_batch_size=steps.mean_batch_size if steps else None,
        dead_row_share=steps.dead_row_share if steps else None,
        num_same=num_same,
        num_compared=num_compared,
    )


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
    num_runs = rows.groupby(["arm", "repeat"]).ngroups
    per_request = rows.groupby("schedule_index")[column]
    same = (per_request.nunique() == 1) & (per_request.count() == num_runs)
    return int(same.sum()), len(same)


def render_comparison(
    rows: pd.DataFrame, manifest: ComparisonManifest, margin: float = DEFAULT_MARGIN
) -> str:
    """The text of a comparison: medians over blocks, ratios with intervals, verdicts in words, validity."""
    figures, reference = compare_arms(rows, manifest), manifest.reference
    is_open = manifest.runs[0].schedule.load.is_open
    found = contrasts(rows, manifest.arms, reference, is_open=is_open, margin=margin)
    num_same, num_planned = agreement_of_all(rows)
    return "\n".join(
        [
            _headline(manifest),
            "",
            _figure_table(figures, manifest.arms, reference),
            "",
            f"Ratios to {reference}, the same requests paired; the intervals of an arm hold together at 95%.",
            "",
            _ratio_table(found),
            "",
            *_verdicts(found, is_open),
            "",
            f"All arms gave the same output for {num_same} of {num_planned} prompts.",
            *manifest.validity.lines(),
        ]
    )


def _ratio_table(found: Sequence[Contrast]) -> str:
    arms = list(dict.fromkeys(contrast.arm for contrast in found))
    lines = [[arm, *(c.text() for c in found if c.arm == arm)] for arm in arms]
    return render_table(["arm", *(metric.name for metric in HEADLINES)], lines)


def _verdicts(found: Sequence[Contrast], is_open: bool) -> list[str]:
    arms = list(dict.fromkeys(contrast.arm for contrast in found))
    lines = [f"{arm}: {in_words(found, arm)}" for arm in arms]
    if missing := more_blocks(found, is_open):
        lines.append(f"{missing} more blocks would decide {primary(is_open).name} (--blocks).")
    return lines


def _headline(manifest: ComparisonManifest) -> str:
    first = manifest.runs[0]
    plan, host = first.schedule, first.host
    users = f"{plan.concurrency} users" if plan.rate is None else f"{plan.rate:g} requests/s"
    return (
        f"{manifest.num_blocks} blocks of {plan.num_requests} requests, {users}, "
        f"seed {first.settings.seed} - {first.model}, {first.engine_text}\n"
        f"{host.cpu_model}, {host.physical_cores} cores. TTFT and total are from schedule."
    )


def _figure_table(figures: Sequence[BlockFigures], arms: Sequence[str], reference: str) -> str:
    lines: list[list[str]] = []
    for arm in arms:
        own = [f for f in figures if f.arm == arm]
        cells = [_median_cell([value(f) for f in own], digits) for _, value, digits in COLUMNS]
        batch = number(_median([f.mean_batch_size for f in own]), 2)
        same = min((f.num_same for f in own), default=0)
        compared = max((f.num_compared for f in own), default=0)
        lines.append(
            [arm, *cells, batch, share(_median([f.dead_row_share for f in own])), f"{same}/{compared}"]
        )
    names = [name for name, _, _ in COLUMNS]
    return render_table(["arm", *names, "mean batch", "dead rows", f"same as {reference}"], lines)


def _median(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None


def _median_cell(values: Sequence[float | None], digits: int) -> str:
    middle = _median(values)
    return f"n<{MIN_SAMPLES[95]}" if middle is None else number(middle, digits)
