"""The interval of one figure of one result.

Three blocks and more tell how far the figure wanders between service starts. Fewer blocks do not, so that the
requests of the run stand in: that interval is too narrow by whatever differs between runs.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.comparing.intervals import FEWEST_BLOCKS, bounded_exp, log_interval
from harness.comparing.verdict import CONFIDENCE
from harness.results.formulas import Floats
from harness.results.metrics import OUTPUT_TOKENS, Figure
from harness.results.stats import rank_interval

NUM_RESAMPLES = 400

Source = Literal["blocks", "requests"]


class Interval(NamedTuple):
    low: float
    high: float
    source: Source


def figure_interval(figure: Figure, rows: pd.DataFrame, value: float, *, is_open: bool) -> Interval | None:
    """At `CONFIDENCE`, around the figure of all these rows; None where nothing tells."""
    parts = [part for _, part in rows.groupby(["run_id", "repeat"])]
    each = [v for part in parts if (v := figure.value(part, is_open, len(parts)))]
    if len(each) >= FEWEST_BLOCKS and value > 0:
        low, high = map(float, log_interval(np.log(each), CONFIDENCE))
        # The middle of the blocks is not the figure of all their requests; the interval is the figure's.
        middle, reach = math.log(value), (high - low) / 2
        return Interval(bounded_exp(middle - reach), bounded_exp(middle + reach), "blocks")
    if figure.q is None:
        return _of_throughput(rows, value, is_open=is_open) if figure.metric is OUTPUT_TOKENS else None
    assert figure.metric.samples is not None
    samples = figure.metric.samples(rows)
    if samples.weights is None or samples.request is None:
        return _of_ranks(samples.values, figure.q)
    return _of_weighted(samples.values, samples.weights, samples.request, figure.q)


def _of_ranks(values: Floats, q: int) -> Interval | None:
    ordered = np.sort(values[~np.isnan(values)])
    ranks = rank_interval(len(ordered), q, (1 - CONFIDENCE) / 2)
    return ranks and Interval(float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1]), "requests")


def _of_weighted(values: Floats, weights: Floats, request: NDArray[np.int64], q: int) -> Interval | None:
    """Bootstrap over requests: the gaps of one answer are alike."""
    order = np.argsort(values)
    sorted_values = values[order]
    names, of_gap = np.unique(request[order], return_inverse=True)
    if len(names) < 2:
        return None
    found = np.empty(NUM_RESAMPLES)
    draws = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), NUM_RESAMPLES
    )
    for index, drawn in enumerate(draws):
        mass = np.cumsum(weights[order] * drawn[of_gap])
        found[index] = sorted_values[min(np.searchsorted(mass, q / 100 * mass[-1]), len(values) - 1)]
    low, high = map(float, np.percentile(found, (2.5, 97.5)))
    return Interval(low, high, "requests")


def _of_throughput(rows: pd.DataFrame, value: float, *, is_open: bool) -> Interval | None:
    """Bootstrap over requests: tokens a second of a user's time, in an open loop tokens alone."""
    done = rows[rows["error"].isna()]
    if len(done) < 2:
        return None
    tokens = done["num_output_tokens"].to_numpy(dtype=float)
    times = np.ones(len(done)) if is_open else done["total_sched_ms"].to_numpy(dtype=float)
    drawn = np.random.default_rng(0).integers(0, len(done), (NUM_RESAMPLES, len(done)))
    rates = tokens[drawn].sum(axis=1) / times[drawn].sum(axis=1)
    middle = tokens.sum() / times.sum()
    if not middle > 0:
        return None
    low, high = np.percentile(rates / middle, (2.5, 97.5))
    return Interval(value * min(1.0, float(low)), value * max(1.0, float(high)), "requests")
