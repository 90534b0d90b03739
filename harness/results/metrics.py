"""The table of metrics. Reports, comparisons, sweeps, the gate, the page, the OpenMetrics file and `--slo`
read it and list nothing of their own.

A new metric is one entry of `METRICS`, and a column of `record` if it needs a new stamp. A latency counts
from the schedule unless its name says `send`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.results.formulas import Samples, frame_gaps, longest_stalls, throughput, token_gaps
from harness.results.stats import MIN_SAMPLES
from harness.results.table import MISSING, number


def column(name: str) -> Callable[[pd.DataFrame], Samples]:
    """One value a request, as it stands in the rows; none for a failed one."""

    def samples(rows: pd.DataFrame) -> Samples:
        values = rows[name].where(rows["error"].isna()).to_numpy(dtype=float)
        return Samples(values)

    return samples


def rate(name: str) -> Callable[[pd.DataFrame, bool], float | None]:
    """A field of `Throughput`."""
    return lambda rows, is_open: getattr(throughput(rows, is_open=is_open), name, None)


def _request_time(rows: pd.DataFrame, is_open: bool) -> float | None:
    """The geometric mean: over the same requests, a ratio of two is the mean ratio of one to itself."""
    times_ms = column("total_sched_ms")(rows).values
    usable = times_ms[times_ms > 0]
    return float(np.exp(np.log(usable).mean())) if len(usable) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quantity: either `samples` (values of requests) or `of_run` (one figure of one replay, from its
    rows and whether the loop was open) computes it."""

    name: str
    unit: str
    """`ms` or `per_s`, say: the end of its name in `--slo`."""
    label: str
    """As tables and verdicts call it."""
    description: str
    samples: Callable[[pd.DataFrame], Samples] | None = None
    of_run: Callable[[pd.DataFrame, bool], float | None] | None = None
    higher_is_better: bool = False
    compared: tuple[int | None, ...] = ()
    """Percentiles that comparisons, sweeps and the page show; `(None,)` for the figure of a run."""
    decides: bool = False
    """Whether a comparison and the gate judge what is compared, or only show it."""
    digits: int = 1
    title: str = ""
    """The label in full, where a table shows more than one clock."""
    aspect: str = ""
    """What a client feels of it; a verdict names one figure of each aspect."""
    phrase: tuple[str, str] = ("", "")
    """How its first figure is said where it is better and where it is worse; {} is a factor."""

    @property
    def figures(self) -> list[Figure]:
        """Every figure there is of it."""
        return [Figure(self, q) for q in ((None,) if self.samples is None else MIN_SAMPLES)]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number: a percentile of a metric, or (`q` None) its figure of a run."""

    metric: Metric
    q: int | None = None

    @property
    def key(self) -> str:
        """As `--slo` spells it: `ttft_p95_ms`, `output_tokens_per_s`."""
        return "_".join(filter(None, (self.metric.name, f"p{self.q}" if self.q else "", self.metric.unit)))

    @property
    def label(self) -> str:
        return self.metric.label if self.q is None else f"{self.metric.label} p{self.q}"

    def value(self, rows: pd.DataFrame, is_open: bool, num_blocks: int = 1) -> float | None:
        """Of one replay, which is one of `num_blocks`; None where too few samples stand behind it."""
        if self.metric.samples is not None and self.q is not None:
            return self.metric.samples(rows).percentile(self.q, num_blocks).value
        return self.metric.of_run(rows, is_open) if self.metric.of_run is not None else None

    def interval(self, rows: pd.DataFrame) -> tuple[float, float] | None:
        """By ranks, of the percentile over all these requests; each end is right in 95% of cases."""
        if self.metric.samples is None or self.q is None:
            return None
        return self.metric.samples(rows).percentile(self.q).interval

    def over(self, rows: pd.DataFrame, is_open: bool) -> float | None:
        """Of several replays: the percentile of all requests, or the median of the replays."""
        if self.q is not None:
            return self.value(rows, is_open)
        each = [self.value(part, is_open) for _, part in rows.groupby(["run_id", "repeat"])]
        values = [value for value in each if value is not None]
        return float(np.median(values)) if values else None

    def text(self, value: float | None) -> str:
        few = MISSING if self.q is None else f"n<{MIN_SAMPLES[self.q]}"
        return few if value is None else number(value, self.metric.digits)

    def interval_text(self, interval: tuple[float, float] | None) -> str:
        """As 150.2-210.9."""
        return MISSING if interval is None else "-".join(number(end, self.metric.digits) for end in interval)


OUTPUT_TOKENS = Metric(
    name="output_tokens", unit="per_s", label="output tok/s", description="Output tokens a second.",
    of_run=rate("output_tokens_per_s"), higher_is_better=True, compared=(None,), decides=True,
    aspect="tokens", phrase=("{} the tokens", "{} the tokens"),
)  # fmt: skip
REQUESTS = Metric(
    name="requests", unit="per_s", label="requests/s", description="Answers a second.",
    of_run=rate("requests_per_s"), higher_is_better=True, digits=2,
)  # fmt: skip
REQUEST_TIME = Metric(
    name="request_time", unit="ms", label="total geomean",
    description="Whole answer, from schedule: geometric mean over requests.",
    of_run=_request_time, compared=(None,), decides=True,
    aspect="whole answer", phrase=("the whole answer {} sooner", "the whole answer {} later"),
)  # fmt: skip
TTFT = Metric(
    name="ttft", unit="ms", label="TTFT", title="TTFT, from schedule",
    description="Time to first token, from schedule.",
    samples=column("ttft_sched_ms"), compared=(50, 95), decides=True,
    aspect="first token", phrase=("TTFT {} sooner", "TTFT {} later"),
)  # fmt: skip
TPOT = Metric(
    name="tpot", unit="ms", label="TPOT", description="Time per output token after the first.",
    samples=column("tpot_ms"), compared=(50, 95), decides=True,
    aspect="each token",
    phrase=("each token after the first {} faster", "each token after the first {} slower"),
)  # fmt: skip
METRICS: list[Metric] = [
    OUTPUT_TOKENS,
    REQUESTS,
    REQUEST_TIME,
    Metric(
        name="ttft_send", unit="ms", label="TTFT, from send",
        description="Time to first token, from the moment of sending.", samples=column("ttft_ms"),
    ),
    TTFT,
    TPOT,
    Metric(
        name="total_send", unit="ms", label="total, from send",
        description="Whole answer, from the moment of sending.", samples=column("total_ms"),
    ),
    Metric(
        name="total", unit="ms", label="total", title="total, from schedule",
        description="Whole answer, from schedule.",
        samples=column("total_sched_ms"), compared=(95,), decides=True, aspect="whole answer",
    ),
    Metric(
        name="itl", unit="ms", label="ITL", description="Gaps between chunks divided by their tokens.",
        samples=token_gaps, compared=(99,), decides=True, aspect="gaps",
        phrase=("ITL p99 {} shorter", "ITL p99 {} longer"),
    ),
    Metric(
        name="gap", unit="ms", label="gap", description="Gaps between chunks, however many tokens they hold.",
        samples=frame_gaps,
    ),
    Metric(
        name="longest_stall", unit="ms", label="longest stall",
        description="The longest gap between two chunks of an answer.",
        samples=longest_stalls, compared=(95,), decides=True, aspect="gaps",
        phrase=("the longest stall (p95) {} shorter", "the longest stall (p95) {} longer"),
    ),
]  # fmt: skip
"""In the order of every table."""
FIGURES = {figure.key: figure for metric in METRICS for figure in metric.figures}
"""Every figure by its key, in the same order."""


def compared_figures() -> list[Figure]:
    return [Figure(metric, q) for metric in METRICS for q in metric.compared]


def deciding_figures() -> list[Figure]:
    return [figure for figure in compared_figures() if figure.metric.decides]


def with_chosen(figures: list[Figure], chosen: Figure | None) -> list[Figure]:
    """And the one that a reader chose to decide, if it is not among them."""
    return figures if chosen is None or chosen in figures else [*figures, chosen]
