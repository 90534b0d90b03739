"""Every chart of a report as a Vega-Lite description: the page, PNG and SVG are drawn from the same one.

Here are the charts of two axes; those that explain are in `explanations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
from altair.utils.schemapi import debug_mode

from harness.page.data import ReportData
from harness.page.explanations import budget_chart, slots_chart, verdict_chart
from harness.page.picture import Picture, arm_scales, of_arms
from harness.results.formulas import Floats

MAX_CURVE_POINTS = 120
_NUMBER = ",.4~r"


def make_charts(data: ReportData) -> dict[str, Picture]:
    """All charts by file name, in the order of the page."""
    with debug_mode(False):  # altair checks every part against the schema: seconds a page
        return {name: picture for name, picture in _all_charts(data).items() if picture}


def _all_charts(data: ReportData) -> dict[str, Picture | None]:
    arms = [arm for arm in data.arms if arm.load == data.arms[0].load]
    kind = f"Gaps between {'tokens' if all(arm.itl_is_per_token for arm in arms) else 'chunks'}"
    right_up = "Up and to the right is better."
    is_by_block = len(data.loads) == 1
    blocks = "One point a block; the lines span them." if is_by_block else "One point a load."
    made: dict[str, Picture | None] = {
        "verdict": verdict_chart(data),
        "slots": slots_chart(data, arms),
        "budget": budget_chart(arms),
        "pareto": _lines(
            data, "Speed of one user over speed of the server", f"{blocks} {right_up}",
            _each_block(data, "user_tokens_per_s", "tokens_per_s"),
            "tokens/s a user (1000 / TPOT p50)", "output tokens/s", has_points=True, has_crosses=is_by_block,
        ),
        "throughput-latency": _lines(
            data, "Throughput and latency", f"{blocks} Down and to the right is better.",
            _each_block(data, "tokens_per_s", "ttft_p50_ms"),
            "output tokens/s", "TTFT p50, from schedule (ms)", log="y", has_points=True,
            has_crosses=is_by_block,
        ),
    }  # fmt: skip
    if data.slo is not None and len(data.loads) > 1:
        good = ((a.name, a.offered, a.goodput_per_s) for a in data.arms)
        made["goodput"] = _lines(
            data, "Goodput over load", f"Requests a second that met {data.slo.text()}.",
            [(name, load, rate, load) for name, load, rate in good if rate is not None],
            "requests/s asked for" if data.is_open else "users", "goodput (requests/s)", has_points=True,
        )  # fmt: skip
    for name, title, values in (
        ("ttft-cdf", "Time to first token, from schedule", [arm.ttft_ms for arm in arms]),
        ("itl-cdf", kind, [arm.itl_ms for arm in arms]),
        ("total-cdf", "Whole answer, from schedule", [arm.total_ms for arm in arms]),
    ):  # fmt: skip
        points = [point for arm, ms in zip(arms, values, strict=True) for point in _cdf(arm.name, ms)]
        caption = "Share of requests that had no longer time." if name != "itl-cdf" else "Share of gaps."
        made[name] = _lines(
            data, title, f"{caption} Left is better.", points, "ms", "share", log="x", is_step=True
        )
    over = [(arm, arm.over_time) for arm in arms if arm.over_time]
    for name, title, unit, column in (
        ("tokens-over-time", "Throughput over time", "output tokens/s", "tokens_per_s"),
        ("batch-over-time", "Batch size over time", "live rows a step", "batch_size"),
    ):
        columns = [(a.name, o.at_s, getattr(o, column)) for a, o in over]
        points = [(name, t, y, t) for name, at, ys in columns for t, y in zip(at, ys, strict=False)]
        made[name] = _lines(
            data, title, "The first block of each arm.", points, "s since the first request", unit
        )
    sizes = [(a.name, float(n), part, n) for a, o in over for n, part in sorted(o.time_at_size.items())]
    made["batch-sizes"] = _lines(
        data, "How large the batch was", "Share of the steps' time at each size, first block.",
        sizes, "live rows a step", "share of time", has_points=True,
    )  # fmt: skip
    drift = [
        (arm.name, block + 1.0, rate / arm.middle_tokens_per_s, block)
        for arm in arms if len(arm.tokens_per_s) > 1 and arm.middle_tokens_per_s
        for block, rate in enumerate(arm.tokens_per_s)
    ]  # fmt: skip
    made["drift"] = _lines(
        data, "Drift from block to block", "Throughput of each block by the arm's median: flat is steady.",
        drift, "block", "output tokens/s by median", has_points=True, y_from_zero=False,
    )  # fmt: skip
    lengths = [(kind, x, y, x) for kind, values in data.lengths.items() for x, y in _bins(values)]
    made["lengths"] = _lines(
        data, "Lengths of prompts and answers", "Requests of each length, in all blocks.",
        lengths, "tokens", "requests", is_step=True, series=list(data.lengths),
    )  # fmt: skip
    return made


Point = tuple[str, float, float, float]
"""Arm, x, y, and what orders the points of a line."""


def _each_block(data: ReportData, x: str, y: str) -> list[Point]:
    """One point a block, or the medians of each load where there are several."""
    points: list[Point] = []
    for arm in data.arms:
        pairs = list(zip(getattr(arm, x), getattr(arm, y), strict=False))
        if len(data.loads) > 1 and pairs:
            pairs = [tuple(np.median(np.array(pairs), axis=0).tolist())]
        points += [(arm.name, a, b, arm.offered) for a, b in pairs]
    return points


def _cdf(name: str, values: Floats) -> Iterable[Point]:
    indices = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_CURVE_POINTS)).astype(int))
    return [(name, float(values[i]), (int(i) + 1) / len(values), int(i)) for i in indices]


def _bins(values: Floats) -> list[tuple[float, float]]:
    if not len(values):
        return []
    counts, edges = np.histogram(values, bins=min(40, max(1, len(np.unique(values)))))
    return [(float(edge), float(count)) for edge, count in zip(edges, (*counts, counts[-1]), strict=True)]


def curves(
    title: str, caption: str, points: Sequence[Point], x: str, y: str, names: Sequence[str]
) -> Picture:
    """Points of what is no report, a line for each name; at least one point."""
    drawn = _lines(None, title, caption, points, x, y, has_points=True, series=names)
    assert drawn is not None
    return drawn


def _lines(
    data: ReportData | None, title: str, caption: str, points: Sequence[Point], x: str, y: str, *,
    log: str = "", is_step: bool = False, has_points: bool = False, has_crosses: bool = False,
    y_from_zero: bool = True,
    series: Sequence[str] | None = None,
) -> Picture | None:  # fmt: skip
    """Series over two axes. Hover finds the nearest point; where a point is a block, a cross spans them."""
    keys = ("arm", "x", "y", "at")
    shown = [
        dict(zip(keys, point, strict=True))
        for point in points
        if np.isfinite(point[1:3]).all() and (point[1:3]["xy".index(log)] > 0 if log else True)
    ]  # fmt: skip
    if not shown:
        return None
    names = series or (data.names if data is not None else [])
    colour, shape = arm_scales(names)
    base = of_arms(shown, [] if series else names).encode(
        x=alt.X("x:Q", title=x, scale=_scale("x" in log, True)),
        y=alt.Y("y:Q", title=y, scale=_scale("y" in log, y_from_zero)),
        color=colour,
        tooltip=[
            alt.Tooltip("arm:N", title="arm"),
            alt.Tooltip("x:Q", title=x, format=_NUMBER),
            alt.Tooltip("y:Q", title=y, format=_NUMBER),
        ],
    )
    layers: list[alt.Chart] = []
    if has_crosses:
        crosses = of_arms(_crosses(shown), names).mark_rule(strokeWidth=1.5)
        layers.append(crosses.encode(x="x:Q", x2="x2:Q", y="y:Q", y2="y2:Q", color=colour))
    else:
        line = base.mark_line(strokeWidth=2, interpolate="step-after" if is_step else "linear")
        layers.append(line.encode(order="at:Q", strokeDash=_dashes(names, has_legend=data is None)))
    dots = base.mark_point(filled=True, size=70, opacity=0.95 if has_points else 0)
    layers.append(dots.encode(shape=shape))
    return Picture(title, caption, alt.layer(*layers).properties(width="container", height=250))


def _crosses(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """From the lowest to the highest block in both directions, through the medians."""
    crosses: list[dict[str, Any]] = []
    for arm in dict.fromkeys(point["arm"] for point in points):
        xs, ys = (np.array([point[key] for point in points if point["arm"] == arm]) for key in "xy")
        across = (xs.min(), xs.max(), np.median(ys), np.median(ys))
        upright = (np.median(xs), np.median(xs), ys.min(), ys.max())
        ends = [dict(zip(("x", "x2", "y", "y2"), map(float, of), strict=True)) for of in (across, upright)]
        crosses += [{"arm": arm, **end} for end in ends]
    return crosses


def _dashes(names: Sequence[str], *, has_legend: bool) -> alt.StrokeDash:
    dashes = ([1, 0], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2], [12, 4], [1, 4], [6, 2, 1, 2])
    cycled = [dashes[i % len(dashes)] for i in range(len(names))]
    scale = alt.Scale(domain=list(names), range=cycled)
    return alt.StrokeDash("arm:N", scale=scale, title=None, legend=alt.Undefined if has_legend else None)


def _scale(is_log: bool, from_zero: bool) -> alt.Scale:
    return alt.Scale(type="log", nice=False) if is_log else alt.Scale(zero=from_zero)
