"""What a report says, as numbers: one `ArmData` for each arm and load, and the contrasts between arms.

Figures of the table of metrics are kept by their key, so that a new metric needs nothing here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from adapters.base import ConfigError, LabError
from harness.comparing.combine import (
    ResultFile,
    choose_reference,
    comparison_manifest,
    join_runs,
    schedules_differ,
    unranked_text,
    validity_of,
)
from harness.comparing.comparison import agreement_of_all
from harness.comparing.contrasts import Contrast, design_of
from harness.comparing.trade import Decision, judge
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.page.timeline import OverTime, Timeline, batch_timeline, load_over_time
from harness.results.cost import Price
from harness.results.formulas import Floats, Samples, throughput
from harness.results.latency_budget import Budget, latency_budget
from harness.results.lengths import Lengths, lengths_of
from harness.results.manifest import ComparisonManifest, RunManifest
from harness.results.metrics import METRICS, OUTPUT_TOKENS, TPOT, TTFT, Figure
from harness.results.slo import Limit, Slo, goodput
from harness.results.stats import MIN_SAMPLES, mean_of
from harness.results.steady import SteadyFigures, steady_figures
from harness.results.steps import STEPS_SUFFIX, read_steps
from harness.results.table import counted

OF_BLOCKS = (Figure(OUTPUT_TOKENS), Figure(TPOT, 50), Figure(TTFT, 50))


@dataclass(frozen=True, slots=True)
class ArmData:
    """One arm under one load, all its blocks together."""

    name: str
    load: str
    offered: float
    """Requests a second, or users of a closed loop."""
    blocks: dict[str, Floats]
    """`OF_BLOCKS` by key, one value a block; NaN where too few answers stand behind it."""
    samples: dict[str, Samples]
    """Of each metric of requests, by its name."""
    figures: dict[str, float | None]
    """Every figure of the table of metrics by its key, as `ttft_p95_ms`; None where samples are too few."""
    intervals: dict[str, tuple[float, float] | None]
    """Of each percentile among `figures`, by ranks."""
    goodput_per_s: float | None
    goodput_share: float | None
    budget: Budget | None
    timeline: Timeline | None
    over_time: OverTime | None
    mean_batch_size: float | None
    dead_row_share: float | None
    usd_per_million_tokens: float | None
    num_failed: int
    steady: SteadyFigures | None
    """Of the steady window; None where load was never as asked."""
    lengths: Lengths | None
    """Of the answers, where the model ends them; None where all have their budget's length."""


@dataclass(frozen=True, slots=True)
class ReportData:
    arms: list[ArmData]
    manifest: ComparisonManifest
    found: list[Contrast]
    decision: Decision | None
    reference: str | None
    """None where nothing is compared under one load."""
    num_same: tuple[int, int]
    """Prompts with the same answer in all arms, and prompts."""
    slo: Slo
    """The limits on each request, which goodput counts."""
    run_limits: tuple[Limit, ...]
    price: Price
    lengths: dict[str, Floats]
    """Tokens of each prompt and of each answer."""

    @property
    def loads(self) -> list[str]:
        return list(dict.fromkeys(arm.load for arm in self.arms))

    @property
    def first_load(self) -> list[ArmData]:
        return [arm for arm in self.arms if arm.load == self.arms[0].load]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(arm.name for arm in self.arms))

    @property
    def is_open(self) -> bool:
        return self.manifest.runs[0].schedule.load.is_open


def load_report(
    files: Sequence[ResultFile],
    *,
    slo: Slo,
    price: Price,
    reference: str | None,
    margin: float,
    objective: Figure | None = None,
) -> ReportData:
    """Everything that these files say. INVALID ones are shown, and marked.

    One schedule in all files makes a comparison with a reference, several make curves over load.

    Raises:
        ConfigError: the reference is not in them, or no row is.
    """
    runs, rows = join_runs(files)
    if rows.empty:
        raise ConfigError("the result files hold no row: nothing was measured, or the rows were taken out")
    kept = files[0].manifest if len(files) == 1 else None
    asked = kept if isinstance(kept, ComparisonManifest) else None
    # Runs stand in the order in which they were measured, arms in the one in which they were asked for.
    arms = asked.arms if asked else list(dict.fromkeys(run.arm for run in runs))
    runs.sort(key=lambda run: arms.index(run.arm))
    # An interrupted comparison may not have come to its reference.
    kept_reference = asked.reference if asked and asked.reference in arms else None
    chosen = choose_reference(arms, reference or kept_reference)
    # What was judged when it was measured, in the words and the order that the terminal shows.
    validity = asked.validity if asked else validity_of(runs, len(runs), one_schedule=False)
    num_blocks = int(rows.groupby("arm")["repeat"].nunique().max())
    manifest = comparison_manifest(runs, arms, chosen, num_blocks, validity)
    return gather(rows, manifest, slo=slo, price=price, margin=margin, objective=objective)


def gather(
    rows: pd.DataFrame,
    manifest: ComparisonManifest,
    *,
    slo: Slo,
    price: Price,
    margin: float = DEFAULT_MARGIN,
    objective: Figure | None = None,
) -> ReportData:
    """All figures of a comparison (one run alone is a comparison of one arm)."""
    runs = manifest.runs
    groups: dict[tuple[str, str], list[RunManifest]] = {}
    for run in runs:
        groups.setdefault((run.arm, load_text(run)), []).append(run)
    arms = [_arm_data(name, load, own, rows, slo, price) for (name, load), own in groups.items()]
    names = [name for name in manifest.arms if any(arm.name == name for arm in arms)]
    reference = None
    found: list[Contrast] = []
    decision = None
    if len(names) > 1 and len({arm.load for arm in arms}) == 1:
        reference, is_open, design = manifest.reference, runs[0].schedule.load.is_open, design_of(runs)
        found, decision = judge(
            rows, names, reference, is_open=is_open, margin=margin, design=design, objective=objective
        )
        if unranked_text(runs):
            decision = None
    return ReportData(
        arms=arms,
        manifest=manifest,
        found=found,
        decision=decision,
        reference=reference,
        num_same=(0, 0) if schedules_differ(runs) else agreement_of_all(rows),
        slo=slo.on_each_request,
        run_limits=slo.on_the_run,
        price=price,
        lengths={
            "prompts": _sorted(rows["num_prompt_tokens"]),
            "answers": _sorted(rows["num_output_tokens"]),
        },
    )


def load_text(run: RunManifest) -> str:
    plan = run.schedule
    if plan.rate is None and plan.concurrency is not None:
        return counted(plan.concurrency, "user")
    rate = f" {plan.rate:g}/s" if plan.rate is not None else ""
    return f"{plan.arrivals}{rate}"


def _arm_data(
    name: str, load: str, runs: Sequence[RunManifest], rows: pd.DataFrame, slo: Slo, price: Price
) -> ArmData:
    own = rows[rows["run_id"].isin([run.run_id for run in runs])]
    schedule = runs[0].schedule
    is_open = schedule.load.is_open
    parts = [part for _, part in own.groupby(["run_id", "repeat"])]
    rates = [throughput(part, is_open=is_open) for part in parts]
    good = [
        goodput(part, slo, rate.window_s)
        for part, rate in zip(parts, rates, strict=True)
        if rate is not None and slo.on_each_request
    ]
    samples: dict[str, Samples] = {}
    figures: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    for metric in METRICS:
        if metric.samples is None:
            figures |= {figure.key: figure.over(own, is_open) for figure in metric.figures}
            continue
        samples[metric.name] = metric.samples(own)
        for q in MIN_SAMPLES:
            key, found = Figure(metric, q).key, samples[metric.name].percentile(q)
            figures[key], intervals[key] = found.value, found.interval
    entries = [entry for run in runs for entry in run.repeats]
    gauges = [entry.server for entry in entries if entry.server]
    timeline, over_time = _over_time(runs[0], own)
    tokens_per_s = figures[OUTPUT_TOKENS.figures[0].key]
    return ArmData(
        name=name,
        load=load,
        offered=schedule.rate if schedule.rate is not None else float(schedule.concurrency or 0),
        blocks={
            f.key: np.array([f.value(part, is_open, len(parts)) or np.nan for part in parts])
            for f in OF_BLOCKS
        },
        samples=samples,
        figures=figures,
        intervals=intervals,
        goodput_per_s=float(np.median([g.requests_per_s for g in good])) if good else None,
        goodput_share=float(np.median([g.share for g in good])) if good else None,
        budget=latency_budget(
            own,
            next((entry.round_trip_s for entry in entries if entry.round_trip_s is not None), None),
            (mean_of([g.queue_s for g in gauges]), mean_of([g.prefill_s for g in gauges])),
        ),
        timeline=timeline,
        over_time=over_time,
        mean_batch_size=mean_of([entry.mean_batch_size for entry in entries]),
        dead_row_share=mean_of([entry.steps.dead_row_share for entry in entries if entry.steps]),
        usd_per_million_tokens=None if tokens_per_s is None else price.per_million_tokens(tokens_per_s),
        num_failed=int(own["error"].notna().sum()),
        steady=steady_figures(own, schedule.load),
        lengths=None if all(run.settings.ignore_eos for run in runs) else lengths_of(own),
    )


def _over_time(run: RunManifest, own: pd.DataFrame) -> tuple[Timeline | None, OverTime | None]:
    """Of the first replay; the step log lies beside the rows of its run."""
    first = min(run.planned_repeats, default=0)
    rows = own[(own["run_id"] == run.run_id) & (own["repeat"] == first)]
    path = Path(run.path or "").with_suffix(STEPS_SUFFIX) if run.path else None
    try:
        steps = read_steps(path) if path is not None and path.is_file() else None
    except LabError as error:
        print(f"no timeline: {error}", file=sys.stderr)
        steps = None
    if steps is None:
        return None, load_over_time(rows, None)
    steps = steps[steps["repeat"] == first]
    slots = run.service.strategy.get("max_batch", 0) if run.service else 0
    return batch_timeline(rows, steps, int(slots)), load_over_time(rows, steps)


def _sorted(values: pd.Series[float]) -> Floats:
    return np.sort(values.dropna().to_numpy(dtype=float))
