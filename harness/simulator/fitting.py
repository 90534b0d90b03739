"""Fits a cost model and the time around steps to one measured run and its step log.

The fit is of relative errors, with large ones counted less: a step that the machine interrupted says nothing
about the model. Every fifth block of steps is held out, whole, since neighbours are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adapters.base import ConfigError
from harness.simulator.calibration import FitQuality
from harness.simulator.costs import (
    IDLE_S,
    LONG_AGO,
    CostModel,
    FittedCost,
    Since,
    StepWork,
    cold_share,
    warm_after,
)

Floats = NDArray[np.float64]

_BLOCK, _EVERY = 40, 5
_KNOTS = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_FEWEST_STEPS = 100
_FEWEST_PROMPTS = 10
"""In steps long after an idle time: where every prompt ends one, nobody can tell what is slow by which."""
_COOLING_STEPS = (0.0, 1.5, 2.5, 4.0, 6.0)
_WORTH_IT = 0.002
"""A mean error that is smaller by less than this is no reason for more numbers."""
_LINEAR = ("prompt_tokens", "prompt_chunks", "decode_context", "prompt_context")


def works_of(steps: pd.DataFrame) -> pd.DataFrame:
    """The counts of `StepWork`, a column each; logs of earlier versions have no contexts and count as 0."""

    def column(name: str) -> pd.Series[float]:
        return steps[name].fillna(0).astype(float)

    return pd.DataFrame(
        {
            "rows": column("num_decode_tokens") + column("num_dead_rows"),
            "prompt_tokens": column("num_prompt_tokens"),
            "prompt_chunks": column("num_prompt_chunks"),
            "decode_context": column("decode_context_tokens"),
            "prompt_context": column("prompt_context_tokens"),
        }
    )


def fit_cost(steps: pd.DataFrame) -> tuple[FittedCost, FitQuality, dict[str, tuple[float, float]]]:
    """`steps` in their order.

    Raises:
        ConfigError: the log is too short.
    """
    works, took_s = works_of(steps), steps["duration_s"].to_numpy(dtype=float)
    ago = _ago(steps, works)
    usable = took_s > 0
    works, took_s, ago = works[usable].reset_index(drop=True), took_s[usable], ago[usable]
    if len(works) < _FEWEST_STEPS:
        raise ConfigError(f"{len(works)} steps are too few for a calibration: at least {_FEWEST_STEPS}")
    held_out = np.arange(len(works)) // _BLOCK % _EVERY == _EVERY - 1
    seen = works[~held_out], took_s[~held_out], ago[~held_out]
    trials = [_fit(*seen, cooling_steps) for cooling_steps in _COOLING_STEPS]
    losses = [_loss(trial, *seen) for trial in trials]
    best = int(np.argmin(losses))
    trial = trials[best if losses[0] - losses[best] > _WORTH_IT else 0]
    said_s = _said_s(trial, works[held_out], ago[held_out])
    errors = np.abs(said_s / took_s[held_out] - 1)
    quality = FitQuality(
        num_fitted=int((~held_out).sum()),
        num_held_out=int(held_out.sum()),
        median_error=float(np.median(errors)),
        p95_error=float(np.quantile(errors, 0.95)),
        total_error=float(said_s.sum() / took_s[held_out].sum() - 1),
    )
    ranges = {str(name): (float(works[name].min()), float(works[name].max())) for name in works}
    return _fit(works, took_s, ago, trial.cooling_steps), quality, ranges


def errors_of(cost: CostModel, steps: pd.DataFrame) -> tuple[float, float]:
    """Median and p95 of the relative errors on these steps."""
    works, usable = works_of(steps), steps["duration_s"] > 0
    said_s = _said_s(cost, works[usable], _ago(steps, works)[usable])
    errors = np.abs(said_s / steps["duration_s"][usable].to_numpy(dtype=float) - 1)
    return float(np.median(errors)), float(np.quantile(errors, 0.95))


def _ago(steps: pd.DataFrame, works: pd.DataFrame) -> NDArray[np.int64]:
    """(steps, 2): the counts of `Since` of each. Where another log begins, the engine was idle before."""
    starts = steps["start_s"].to_numpy(dtype=float)
    gaps = starts[1:] - (starts + steps["duration_s"].to_numpy(dtype=float))[:-1]
    is_after_idle = np.r_[True, np.abs(gaps) >= IDLE_S]
    at = np.arange(len(steps))

    def since(marked: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.asarray(at - np.maximum.accumulate(np.where(marked, at, -LONG_AGO)))

    return np.column_stack([since(works["prompt_tokens"].to_numpy() > 0), since(is_after_idle)])


def _said_s(cost: CostModel, works: pd.DataFrame, ago: NDArray[np.int64]) -> Floats:
    each = zip(works.to_numpy(), ago.tolist(), strict=True)
    return np.array([cost.step_s(StepWork(*map(int, work)), Since(*since)) for work, since in each])


def _loss(cost: CostModel, works: pd.DataFrame, took_s: Floats, ago: NDArray[np.int64]) -> float:
    """The mean error, of which an interrupted step adds no more than another bad one."""
    return float(np.minimum(np.abs(_said_s(cost, works, ago) / took_s - 1), 0.3).mean())


def _fit(works: pd.DataFrame, took_s: Floats, ago: NDArray[np.int64], cooling_steps: float) -> FittedCost:
    rows = works["rows"].to_numpy()
    knots = _knots(rows)
    features = {name: works[name].to_numpy() for name in _LINEAR}
    features["has_prompt"] = (features["prompt_tokens"] > 0).astype(float)
    hats = _hats(rows, knots)
    cold = [f"cold {knot}" for knot in knots] if cooling_steps else []
    if cooling_steps:
        since_prompt, since_idle = ago.T
        if features["has_prompt"][since_idle > warm_after(cooling_steps)].sum() >= _FEWEST_PROMPTS:
            features["idle"] = _shares(since_idle, cooling_steps)
        share = np.where(since_prompt > 0, _shares(since_prompt - 1, cooling_steps), 0.0)
        features |= {name: hats[:, place] * share for place, name in enumerate(cold)}
    names = [name for name, of_it in features.items() if of_it.any()]
    while True:
        columns = np.column_stack([hats, *(features[name] for name in names)])
        coefficients = _robust(columns, took_s)
        linear = dict(zip(names, coefficients[len(knots) :], strict=True))
        negative = [name for name in names if linear[name] < 0]
        if not negative:
            break
        names.remove(min(negative, key=lambda name: linear[name] * features[name].max()))
    values = np.maximum.accumulate(np.maximum(coefficients[: len(knots)], 0.0))
    of = {name: float(linear.get(name, 0.0)) for name in features}
    return FittedCost(
        knots=tuple(knots),
        at_rows=tuple(map(float, values)),
        prompt_step_s=of["has_prompt"],
        prompt_token_s=of["prompt_tokens"],
        prompt_chunk_s=of["prompt_chunks"],
        decode_context_s=of["decode_context"],
        prompt_context_s=of["prompt_context"],
        cold_at_rows=tuple(of[name] for name in cold),
        idle_s=of.get("idle", 0.0),
        cooling_steps=cooling_steps,
    )


def _shares(num_steps: NDArray[np.int64], cooling_steps: float) -> Floats:
    return np.array([cold_share(num, cooling_steps) for num in num_steps.tolist()])


def _knots(rows: Floats) -> list[int]:
    """Numbers of rows that were seen, with enough steps around each; the least and the most among them."""
    seen = sorted({int(row) for row in rows})
    inner = [knot for knot in _KNOTS if (rows == knot).sum() >= 10]
    return sorted({seen[0], seen[-1], *inner})


def _hats(rows: Floats, knots: Sequence[int]) -> Floats:
    """Piecewise linear in the rows: (steps, knots), each line adding up to 1."""
    return np.column_stack([np.interp(rows, knots, np.eye(len(knots))[i]) for i in range(len(knots))])


def _robust(columns: Floats, took_s: Floats) -> Floats:
    """Least squares of relative errors, reweighted as by Huber (1964)."""
    scaled = columns / took_s[:, None]
    size = np.maximum(np.abs(scaled).max(axis=0), 1e-30)
    scaled = scaled / size
    weights = np.ones(len(took_s))
    solution = np.zeros(columns.shape[1])
    for _ in range(20):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(scaled * root[:, None], root, rcond=1e-9)[0]
        residuals = np.abs(scaled @ solution - 1)
        bound = max(1.345 * 1.4826 * float(np.median(residuals)), 1e-6)
        weights = np.minimum(1.0, bound / np.maximum(residuals, 1e-12))
    return np.asarray(solution / size)


def line(x: Floats, y: Floats) -> tuple[float, float]:
    """Intercept and slope, neither below 0, by medians of medians: half of the points may be wrong.

    Source: Theil (1950), Sen (1968), over the medians at each x.
    """
    if not len(x):
        return 0.0, 0.0
    medians = pd.Series(y).groupby(x).agg(["median", "size"])
    medians = medians[medians["size"] >= min(5, medians["size"].max())]
    at, mid = medians.index.to_numpy(dtype=float), medians["median"].to_numpy()
    i, j = np.triu_indices(len(at), 1)
    slope = max(0.0, float(np.median((mid[j] - mid[i]) / (at[j] - at[i])))) if len(i) else 0.0
    return max(0.0, float(np.median(y - slope * x))), slope
