"""What a report says, as numbers: one `ArmData` for each arm and load, and the contrasts between arms.

Figures of the table of metrics are kept by their label, so that a new metric needs nothing here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from adapters.base import LabError
from harness.comparing.comparison import block_seconds
from harness.comparing.contrasts import Contrast, contrasts, places_of
from harness.comparing.trade import Decision, decide
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.page.timeline import OverTime, Timeline, batch_timeline, load_over_time
from harness.results.cost import Price
from harness.results.facts import ServerGauges
from harness.results.formulas import Floats, Throughput, throughput, token_gaps
from harness.results.latency_budget import Budget, latency_budget
from harness.results.lengths import Lengths, lengths_of
from harness.results.manifest import ComparisonManifest, RunManifest
from harness.results.metrics import METRICS, TPOT, TTFT, Figure
from harness.results.slo import Limit, Slo, goodput
from harness.results.stats import mean_of
from harness.results.steady import SteadyFigures, steady_figures
from harness.results.steps import STEPS_SUFFIX, read_steps


@dataclass(frozen=True, slots=True)
class ArmData:
    """One arm under one load, all its blocks together. Latencies are sorted, in ms."""

    name: str
    load: str
    offered: float
    """Requests a second, or users of a closed loop."""
    tokens_per_s: list[float]
    """One a block."""
    user_tokens_per_s: list[float]
    """One a block: 1000 / TPOT p50; NaN where too few answers stand behind it, as in `ttft_p50_ms`."""
    ttft_p50_ms: list[float]
    """One a block, from schedule."""
    ttft_ms: Floats
    total_ms: Floats
    itl_ms: Floats
    itl_is_per_token: bool
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
    steady: SteadyFigures | None = None
    """Of the steady window; None where load was never as asked."""
    lengths: Lengths | None = None
    """Of the answers, where the model ends them; None where all have their budget's length."""

    @property
    def middle_tokens_per_s(self) -> float:
        return float(np.median(self.tokens_per_s)) if self.tokens_per_s else 0.0


@dataclass(frozen=True, slots=True)
class ReportData:
    arms: list[ArmData]
    found: list[Contrast]
    decision: Decision | None
    block_s: float | None
    """How long a block takes."""
    reference: str | None
    is_open: bool
    num_blocks: int
    num_same: tuple[int, int]
    slo: Slo | None
    """The limits on each request, which goodput counts; None without."""
    run_limits: tuple[Limit, ...]
    price: Price
    manifest: ComparisonManifest
    lengths: dict[str, Floats]
    """Tokens of each prompt and of each answer."""

    @property
    def loads(self) -> list[str]:
        return list(dict.fromkeys(arm.load for arm in self.arms))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(arm.name for arm in self.arms))


def gather(
    rows: pd.DataFrame,
    manifest: ComparisonManifest,
    *,
    slo: Slo,
    price: Price,
    margin: float = DEFAULT_MARGIN,
    num_same: tuple[int, int] = (0, 0),
    objective: Figure | None = None,
) -> ReportData:
    """All figures of a comparison (one run alone is a comparison of one arm)."""
    runs = manifest.runs
    groups: dict[tuple[str, str], list[RunManifest]] = {}
    for run in runs:
        groups.setdefault((run.arm, load_text(run)), []).append(run)
    arms = [_arm_data(name, load, own, rows, slo, price) for (name, load), own in groups.items()]
    is_open = runs[0].schedule.load.is_open
    names = [name for name in manifest.arms if any(arm.name == name for arm in arms)]
    one_load = len({arm.load for arm in arms}) == 1
    reference = manifest.reference if len(names) > 1 and one_load else None
    found: list[Contrast] = []
    decision = None
    if reference:
        places = places_of(runs)
        found = contrasts(rows, names, reference, is_open=is_open, margin=margin, places=places)
        decision = decide(
            rows, names, reference, is_open=is_open, margin=margin, places=places, objective=objective
        )
    return ReportData(
        arms=arms,
        found=found,
        decision=decision,
        block_s=block_seconds(manifest),
        reference=reference,
        is_open=is_open,
        num_blocks=manifest.num_blocks,
        num_same=num_same,
        slo=slo.on_each_request or None,
        run_limits=slo.on_the_run,
        price=price,
        manifest=manifest,
        lengths={
            words: _sorted(rows[column])
            for words, column in (("prompts", "num_prompt_tokens"), ("answers", "num_output_tokens"))
        },
    )


def load_text(run: RunManifest) -> str:
    plan = run.schedule
    if plan.rate is None and plan.concurrency is not None:
        return f"{plan.concurrency} user{'s' * (plan.concurrency != 1)}"
    rate = f" {plan.rate:g}/s" if plan.rate is not None else ""
    return f"{plan.arrivals}{rate}"


def _offered(run: RunManifest) -> float:
    plan = run.schedule
    return plan.rate if plan.rate is not None else float(plan.concurrency or 0)


def _arm_data(
    name: str, load: str, runs: Sequence[RunManifest], rows: pd.DataFrame, slo: Slo, price: Price
) -> ArmData:
    ids = {run.run_id for run in runs}
    own = rows[rows["run_id"].isin(ids)]
    done = own[own["error"].isna()]
    is_open = runs[0].schedule.load.is_open
    parts = [part for _, part in own.groupby(["run_id", "repeat"])]
    rates = [(part, rate) for part in parts if (rate := throughput(part, is_open=is_open)) is not None]
    tokens_per_s = [rate.output_tokens_per_s for _, rate in rates]
    good = [goodput(part, slo, rate.window_s) for part, rate in rates] if slo.on_each_request else []
    gaps = token_gaps(done)
    steps = [entry.steps for run in runs for entry in run.repeats if entry.steps]
    gauges = [entry.server for run in runs for entry in run.repeats if entry.server]
    ttft_ms, total_ms = (_sorted(done[column]) for column in ("ttft_sched_ms", "total_sched_ms"))
    timeline, over_time = _over_time(runs[0], own)
    round_trips = [entry.round_trip_s for run in runs for entry in run.repeats]
    return ArmData(
        name=name,
        load=load,
        offered=_offered(runs[0]),
        tokens_per_s=tokens_per_s,
        user_tokens_per_s=[1e3 / ms for ms in _each(Figure(TPOT, 50), rates, is_open)],
        ttft_p50_ms=_each(Figure(TTFT, 50), rates, is_open),
        ttft_ms=ttft_ms,
        total_ms=total_ms,
        itl_ms=np.sort(np.repeat(gaps.values, 1 if gaps.weights is None else gaps.weights.astype(int))),
        itl_is_per_token=gaps.is_per_token,
        figures={f.key: f.over(own, is_open) for metric in METRICS for f in metric.figures},
        intervals={f.key: f.interval(own) for metric in METRICS for f in metric.figures},
        goodput_per_s=float(np.median([g.requests_per_s for g in good])) if good else None,
        goodput_share=float(np.median([g.share for g in good])) if good else None,
        budget=latency_budget(
            own,
            next((trip for trip in round_trips if trip is not None), None),
            [mean_of([s for g in gauges if (s := told(g)) is not None]) for told in _SERVER_MEANS],
        ),
        timeline=timeline,
        over_time=over_time,
        mean_batch_size=mean_of(
            [size for run in runs for e in run.repeats if (size := e.mean_batch_size) is not None]
        ),
        dead_row_share=mean_of([entry.dead_row_share for entry in steps]),
        usd_per_million_tokens=price.per_million_tokens(float(np.median(tokens_per_s)))
        if tokens_per_s
        else None,
        num_failed=int(own["error"].notna().sum()),
        steady=steady_figures(own, runs[0].schedule.load),
        lengths=None if all(run.settings.ignore_eos for run in runs) else lengths_of(own),
    )


_SERVER_MEANS: tuple[Callable[[ServerGauges], float | None], ...] = (
    lambda gauges: gauges.queue_s,
    lambda gauges: gauges.prefill_s,
)


def _each(figure: Figure, rates: Sequence[tuple[pd.DataFrame, Throughput]], is_open: bool) -> list[float]:
    values = [figure.value(part, is_open, len(rates)) for part, _ in rates]
    return [value or float("nan") for value in values]


def _over_time(run: RunManifest, own: pd.DataFrame) -> tuple[Timeline | None, OverTime | None]:
    """Of the first replay; the step log lies beside the rows of its run."""
    first = min(run.planned_repeats, default=0)
    rows = own[(own["run_id"] == run.run_id) & (own["repeat"] == first)]
    rows_path = Path(run.path or "")
    if not rows_path.name or not (path := rows_path.with_suffix(STEPS_SUFFIX)).is_file():
        return None, load_over_time(rows, None)
    try:
        steps = read_steps(path)
    except LabError as error:
        print(f"no timeline: {error}", file=sys.stderr)
        return None, load_over_time(rows, None)
    steps = steps[steps["repeat"] == first]
    slots = run.service.strategy.get("max_batch", 0) if run.service else 0
    return batch_timeline(rows, steps, int(slots)), load_over_time(rows, steps)


def _sorted(values: pd.Series[float]) -> Floats:
    return np.sort(values.dropna().to_numpy(dtype=float))
