"""Every chart of a report as a Vega-Lite description: the page, PNG and SVG are drawn from the same one.

Here are the charts of two axes; those that explain are in `explanations`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness.page.data import OF_BLOCKS, ReportData
from harness.page.explanations import budget_chart, slots_chart, verdict_chart
from harness.page.picture import ARM_COLOURS, DASHES, SHAPES, Picture, Spec, cycled, hover, of_arms, quantity
from harness.results.formulas import Floats, Samples

MAX_CURVE_POINTS = 120
ROWS = "live rows a step"
Point = tuple[str, float, float]
"""Arm (or another series), x, y."""


def make_charts(data: ReportData) -> dict[str, Picture]:
    """All charts by file name, in the order of the page."""
    charts = {
        "verdict": verdict_chart(data),
        "slots": slots_chart(data.first_load),
        "budget": budget_chart(data.first_load),
        **_trades(data),
        **_distributions(data),
        **_over_time(data),
    }
    return {name: picture for name, picture in charts.items() if picture}


def _trades(data: ReportData) -> dict[str, Picture | None]:
    """One figure over another: a point a block, or a line of the medians of each load."""
    is_by_block = len(data.loads) == 1
    points = "One point a block; the lines span them." if is_by_block else "One point a load."
    mark = "cross" if is_by_block else "dots"
    rates, tpots, ttfts = (figure.key for figure in OF_BLOCKS)
    users: list[Point] = []
    waits: list[Point] = []
    for arm in data.arms:
        blocks = pd.DataFrame([1e3 / arm.blocks[tpots], arm.blocks[rates], arm.blocks[ttfts]]).T
        shown = blocks if is_by_block else blocks.median().to_frame().T
        for user, rate, wait in shown.itertuples(index=False):
            users.append((arm.name, user, rate))
            waits.append((arm.name, rate, wait))
    charts = {
        "pareto": lines(
            "Speed of one user over speed of the server", f"{points} Up and to the right is better.",
            users, "tokens/s a user (1000 / TPOT p50)", "output tokens/s", data.names, mark=mark,
        ),
        "throughput-latency": lines(
            "Throughput and latency", f"{points} Down and to the right is better.",
            waits, "output tokens/s", "TTFT p50, from schedule (ms)", data.names, log="y", mark=mark,
        ),
    }  # fmt: skip
    if data.slo and not is_by_block:
        good = [(arm.name, arm.offered, arm.goodput_per_s) for arm in data.arms]
        charts["goodput"] = lines(
            "Goodput over load", f"Requests a second that met {data.slo.text()}.",
            [(name, load, rate) for name, load, rate in good if rate is not None],
            "requests/s asked for" if data.is_open else "users", "goodput (requests/s)", data.names,
            mark="dots",
        )  # fmt: skip
    return charts


def _distributions(data: ReportData) -> dict[str, Picture | None]:
    gaps = "tokens" if all(arm.samples["itl"].is_per_token for arm in data.first_load) else "chunks"
    charts = {
        f"{name}-cdf": lines(
            title, f"Share of {whose}. Left is better.",
            [point for arm in data.first_load for point in _cdf(arm.name, arm.samples[name])],
            "ms", "share", data.names, log="x", mark="steps",
        )
        for name, title, whose in (
            ("ttft", "Time to first token, from schedule", "requests that had no longer time"),
            ("itl", f"Gaps between {gaps}", "gaps"),
            ("total", "Whole answer, from schedule", "requests that had no longer time"),
        )
    }  # fmt: skip
    lengths = [(words, x, y) for words, values in data.lengths.items() for x, y in _bins(values)]
    charts["lengths"] = lines(
        "Lengths of prompts and answers", "Requests of each length, in all blocks.",
        lengths, "tokens", "requests", list(data.lengths), mark="steps", is_of_arms=False,
        colours=("#8B5E3C", "#8E6CC8"),
    )  # fmt: skip
    return charts


def _over_time(data: ReportData) -> dict[str, Picture | None]:
    over = [(arm.name, arm.over_time) for arm in data.first_load if arm.over_time]
    drift = [
        (arm.name, block + 1.0, rate / middle)
        for arm in data.first_load
        if len(rates := arm.blocks[OF_BLOCKS[0].key]) > 1 and (middle := arm.figures[OF_BLOCKS[0].key])
        for block, rate in enumerate(rates)
    ]
    return {
        "tokens-over-time": lines(
            "Throughput over time", "The first block of each arm.",
            [(name, *point) for name, of in over for point in of.tokens_per_s],
            "s since the first request", "output tokens/s", data.names,
        ),
        "batch-over-time": lines(
            "Batch size over time", "The first block of each arm.",
            [(name, *point) for name, of in over for point in of.batch_size],
            "s since the first request", ROWS, data.names,
        ),
        "batch-sizes": lines(
            "How large the batch was", "Share of the steps' time at each size, first block.",
            [(name, *point) for name, of in over for point in of.time_at_size],
            ROWS, "share of time", data.names, mark="dots",
        ),
        "drift": lines(
            "Drift from block to block", "Throughput of each block by the arm's median: flat is steady.",
            drift, "block", "output tokens/s by median", data.names, mark="dots", from_zero=False,
        ),
    }  # fmt: skip


def _cdf(name: str, samples: Samples) -> list[Point]:
    values = np.repeat(samples.values, 1 if samples.weights is None else samples.weights.astype(int))
    values = np.sort(values[~np.isnan(values)])
    indices = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_CURVE_POINTS)).astype(int))
    return [(name, float(values[i]), (int(i) + 1) / len(values)) for i in indices]


def _bins(values: Floats) -> list[tuple[float, float]]:
    if not len(values):
        return []
    counts, edges = np.histogram(values, bins=min(40, max(1, len(np.unique(values)))))
    return list(zip(edges.tolist(), [*counts.tolist(), int(counts[-1])], strict=True))


def lines(
    title: str, caption: str, points: Sequence[Point], x: str, y: str, names: Sequence[str], *,
    mark: str = "line", log: str = "", from_zero: bool = True, is_of_arms: bool = True,
    colours: Sequence[str] = ARM_COLOURS,
) -> Picture | None:  # fmt: skip
    """Series over two axes; None without a point. `mark` is one of line, steps, dots (a line with its points)
    and cross (points are blocks; lines span them in both directions, through their medians)."""
    kept: list[dict[str, Any]] = [
        {"arm": name, "x": at, "y": value}
        for name, at, value in points
        if math.isfinite(at) and math.isfinite(value) and (not log or (at if log == "x" else value) > 0)
    ]
    if not kept:
        return None

    axes = {
        of: _axis(of, words, [float(point[of]) for point in kept], of == log, from_zero)
        for of, words in (("x", x), ("y", y))
    }
    spans = [
        {
            "mark": {"type": "rule", "strokeWidth": 1.5},
            "encoding": {
                along: axes[along] | {"aggregate": "min"},
                f"{along}2": {"field": along, "aggregate": "max"},
                across: axes[across] | {"aggregate": "median"},
            },
        }
        for along, across in ("xy", "yx")
    ]
    has_dots = mark in ("dots", "cross")
    colour, dash, shape = (
        {"field": "arm", "scale": cycled(names, of), "title": None} for of in (colours, DASHES, SHAPES)
    )
    if not has_dots:
        colour["legend"] = {"symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolSize": 300}
    line = {
        "mark": {"type": "line", "interpolate": "step-after" if mark == "steps" else "linear"},
        "encoding": {"order": {"value": None}} | ({} if has_dots else {"strokeDash": dash}),
    }
    dots = {
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.95 * has_dots},
        "encoding": {"tooltip": hover("arm", x=x, y=y)} | ({"shape": shape} if has_dots else {}),
    }
    spec = {
        **(of_arms(kept) if is_of_arms else {"data": {"values": kept}}),
        "height": 250,
        "encoding": {**axes, "color": colour},
        "layer": [*(spans if mark == "cross" else [line]), dots],
    }
    return Picture(title, caption, spec)


def _axis(of: str, title: str, values: Sequence[float], is_log: bool, from_zero: bool) -> Spec:
    """With room beyond the outermost values; whole ticks where values, or what they count, are whole."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low or abs(high) or 1.0)
    domain = [low / 1.2, high * 1.2] if is_log else [0.0 if from_zero else low - room, high + room]
    scale = {"domain": domain, "type": "log" if is_log else "linear"}
    is_whole = title == ROWS or all(value.is_integer() for value in values)
    ticks = {"tickMinStep": 1, "format": ",d"} if is_whole and not is_log else {}
    return quantity(of, title, scale=scale, axis=ticks)
