"""Every chart of a report as a Vega-Lite description: the page, PNG and SVG are drawn from the same one.

Arms have the colours of Okabe and Ito, and a shape each; phases (of a slot, of the time to the first token)
have Tol's light colours, so that no colour means both. What comes from outside is data in a description,
never a field name or an expression.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import numpy as np
from altair.utils.schemapi import debug_mode

from harness.comparing.contrasts import Contrast
from harness.comparing.trade import phrase_of
from harness.page.data import ArmData, ReportData
from harness.results.formulas import Floats
from harness.results.latency_budget import TERMS

MAX_CURVE_POINTS = 120
MAX_BARS = 300
TIMELINE_STRETCH = 3.0
"""All arms show as much time as this many of the shortest, so that single steps stay visible."""
ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#A08000")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "stroke")
PHASE_COLOURS = {"prompt": "#44BB99", "tokens": "#77AADD", "dead row": "#EE8866", "empty": "#B0B0B040"}
TERM_COLOURS = dict(
    zip(
        [*(words for _, words in TERMS), "residual"],
        ("#EEDD88", "#AAAA00", "#C8C8C8", "#99DDFF", "#BBCC33", "#EE8866", "#44BB99", "#FFAABB", "#8C8C8C"),
        strict=True,
    )
)
WORD_COLOURS = {"better": "#009E73", "worse": "#D55E00", "equivalent": "#0072B2", "can't tell": "#8A8A8A"}
_SHAPE_OF_WORD = ("triangle-right", "triangle-left", "square", "circle")
_NUMBER = ",.4~r"


@dataclass(frozen=True, slots=True)
class Picture:
    """`caption` says what is to be seen; it is the text of those who see no picture."""

    title: str
    caption: str
    chart: alt.Chart | alt.LayerChart | alt.FacetChart


def theme(*, is_dark: bool = False) -> dict[str, Any]:
    """What a description leaves open; the page has both."""
    ink, grid = ("#E6E6E6", "#3A3F47") if is_dark else ("#222222", "#DDDDDD")
    words = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": None if is_dark else "#FFFFFF",
        "font": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif",
        "aria": False,
        "axis": {**words, "gridColor": grid, "domainColor": grid, "tickColor": grid, "labelLimit": 190},
        "legend": {**words, "orient": "bottom", "columns": 2, "labelLimit": 300, "symbolLimit": 30},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": ink},
        "view": {"stroke": None},
    }


def description(
    picture: Picture, names: Sequence[str], *, has_legend: bool, width: int | None = None
) -> dict[str, Any]:
    """A whole Vega-Lite description. The page has one legend of arms above all charts, and sets the width."""
    chart: dict[str, Any] = picture.chart.to_dict(validate=False)
    del chart["config"]
    if not has_legend:
        _drop_arm_legends(chart)
    if width is not None:
        chart |= {"width": width, "title": {"text": picture.title, "anchor": "start"}}
    params = [{"name": "shown", "value": list(names)}, *chart.get("params", ())]
    return {**chart, "params": params, "autosize": {"type": "fit-x", "contains": "padding"}}


def _drop_arm_legends(part: Any) -> None:
    if isinstance(part, dict):
        for name in ("color", "shape"):
            channel = part.get(name)
            if isinstance(channel, dict) and channel.get("field") == "arm":
                channel["legend"] = None
        for inner in ("layer", "encoding"):
            _drop_arm_legends(part.get(inner))
    elif isinstance(part, list):
        for inner in part:
            _drop_arm_legends(inner)


def make_charts(data: ReportData) -> dict[str, Picture]:
    """All charts by file name, in the order of the page."""
    with debug_mode(False):  # altair checks every part against the schema: seconds a page
        return {name: picture for name, picture in _all_charts(data).items() if picture}


def _all_charts(data: ReportData) -> dict[str, Picture | None]:
    arms = [arm for arm in data.arms if arm.load == data.arms[0].load]
    kind = f"Gaps between {'tokens' if all(arm.itl_is_per_token for arm in arms) else 'chunks'}"
    right_up = "Up and to the right is better."
    blocks = "One point a load." if len(data.loads) > 1 else "One point a block; the lines span them."
    made: dict[str, Picture | None] = {
        "verdict": _verdict(data),
        "slots": _slots(data, arms),
        "budget": _budget(arms),
        "pareto": _lines(
            data, "Speed of one user over speed of the server", f"{blocks} {right_up}",
            _each_block(data, "user_tokens_per_s", "tokens_per_s"),
            "tokens/s a user (1000 / TPOT p50)", "output tokens/s", has_points=True,
        ),
        "throughput-latency": _lines(
            data, "Throughput and latency", f"{blocks} Down and to the right is better.",
            _each_block(data, "tokens_per_s", "ttft_p50_ms"),
            "output tokens/s", "TTFT p50, from schedule (ms)", log="y", has_points=True,
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
    for name, title, unit in (
        ("tokens-over-time", "Throughput over time", "output tokens/s"),
        ("batch-over-time", "Batch size over time", "live rows a step"),
    ):
        columns = [(a.name, o.at_s, o.tokens_per_s if unit[0] == "o" else o.batch_size) for a, o in over]
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


def _lines(
    data: ReportData, title: str, caption: str, points: Sequence[Point], x: str, y: str, *,
    log: str = "", is_step: bool = False, has_points: bool = False, y_from_zero: bool = True,
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
    colour, shape = arm_scales(series or data.names)
    base = _of_arms(shown, [] if series else data.names).encode(
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
    if "One point a block" in caption:
        crosses = _of_arms(_crosses(shown), data.names).mark_rule(strokeWidth=1.5)
        layers.append(crosses.encode(x="x:Q", x2="x2:Q", y="y:Q", y2="y2:Q", color=colour))
    else:
        line = base.mark_line(strokeWidth=2, interpolate="step-after" if is_step else "linear")
        layers.append(line.encode(order="at:Q", strokeDash=_dashes(series or data.names)))
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


def _of_arms(values: Sequence[Mapping[str, Any]], names: Sequence[str]) -> alt.Chart:
    """A chart of values that have an `arm`; those that the reader switched off are not drawn."""
    chart = alt.Chart(alt.InlineData(values=list(values)))
    return chart.transform_filter("indexof(shown, datum.arm) >= 0") if names else chart


def arm_scales(names: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    def cycled(of: Sequence[str]) -> alt.Scale:
        return alt.Scale(domain=list(names), range=[of[i % len(of)] for i in range(len(names))])

    return (
        alt.Color("arm:N", scale=cycled(ARM_COLOURS), title=None),
        alt.Shape("arm:N", scale=cycled(SHAPES), title=None),
    )


def _dashes(names: Sequence[str]) -> alt.StrokeDash:
    dashes = ([1, 0], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2], [12, 4], [1, 4], [6, 2, 1, 2])
    cycled = [dashes[i % len(dashes)] for i in range(len(names))]
    return alt.StrokeDash("arm:N", scale=alt.Scale(domain=list(names), range=cycled), legend=None)


def _scale(is_log: bool, from_zero: bool) -> alt.Scale:
    return alt.Scale(type="log", nice=False) if is_log else alt.Scale(zero=from_zero)


def _verdict(data: ReportData) -> Picture | None:
    """The first arm against the reference: how many times better or worse, and how sure."""
    made = data.decision
    told = (made.against_reference or made.against_next) if made else []
    found = [(c, c.verdict) for c in told if c.verdict]
    if not found or made is None:
        return None
    values: list[dict[str, Any]] = []
    for contrast, verdict in found:
        low, high = verdict.interval or (verdict.ratio, verdict.ratio)
        ends = [_times_better(contrast, value) for value in (verdict.ratio, low, high)]
        row: dict[str, Any] = {
            "figure": contrast.figure.label,
            "word": verdict.word,
            "ratio": contrast.text(),
        }
        row |= {"x": ends[0], "low": min(ends[1:]), "high": max(ends[1:])}
        row["said"] = phrase_of(contrast) if verdict.word in ("better", "worse") else verdict.text()
        values.append(row)
    # Few blocks give intervals over many powers of ten: the axis keeps to what the ratios need.
    far = max(2.0, *(2 * max(v["x"], 1 / v["x"]) for v in values))
    words = [word for word in WORD_COLOURS if any(v["word"] == word for v in values)]
    order = [contrast.figure.label for contrast, _ in found]
    words_of_tick = (
        "datum.value == 1 ? 'same' : format(max(datum.value, 1 / datum.value), '.2~r') + "
        "(datum.value < 1 ? 'x worse' : 'x better')"
    )
    base = alt.Chart(alt.InlineData(values=values)).encode(
        y=alt.Y("figure:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelPadding=8)),
        tooltip=[alt.Tooltip(f"{name}:N", title=name) for name in ("figure", "ratio", "said")],
    )
    colours = alt.Scale(domain=words, range=[WORD_COLOURS[word] for word in words])
    coloured = base.encode(color=alt.Color("word:N", scale=colours, title=None))
    scale = alt.Scale(type="log", domain=[1 / far, far], clamp=True)
    x = alt.X("x:Q", title=None, axis=alt.Axis(labelExpr=words_of_tick, tickCount=4), scale=scale)
    shapes = dict(zip(WORD_COLOURS, _SHAPE_OF_WORD, strict=True))
    shape = alt.Shape("word:N", title=None, scale=alt.Scale(domain=words, range=[shapes[w] for w in words]))
    # Words near an end would run out of the picture.
    sides: dict[Literal["left", "center", "right"], tuple[float, float]]
    sides = {"left": (0, far**-0.3), "center": (far**-0.3, far**0.3), "right": (far**0.3, far)}
    said = [
        base.mark_text(dy=-11, align=side, fontWeight=600)
        .transform_filter(f"datum.x > {low} && datum.x <= {high}")
        .encode(x=x, text="said:N")
        for side, (low, high) in sides.items()
    ]
    layers = (
        alt.Chart(alt.InlineData(values=[{"x": 1}])).mark_rule(strokeDash=[4, 3]).encode(x=x),
        coloured.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q", scale=scale), x2="high:Q"),
        coloured.mark_point(filled=True, size=110, opacity=1).encode(x=x, shape=shape),
        *said,
    )
    other = data.reference if made.against_reference else made.second
    return Picture(
        f"{made.first} against {other}",
        "Right of the dashed line is better; the bars are intervals that hold together at 95%.",
        alt.layer(*layers).properties(width="container", height=40 * len(values)),
    )


def _times_better(contrast: Contrast, ratio: float) -> float:
    return ratio if contrast.figure.metric.higher_is_better else 1 / ratio


def _budget(arms: Sequence[ArmData]) -> Picture | None:
    labels = [*TERMS, ("residual_ms", "residual")]
    values: list[dict[str, Any]] = [
        {"arm": arm.name, "term": words, "ms": max(0.0, means[name]), "order": place}
        for arm in arms
        if arm.budget and (means := arm.budget.means())
        for place, (name, words) in enumerate(labels)
    ]
    used = [w for _, w in labels if any(v["term"] == w and v["ms"] > 0.0005 for v in values)]
    if not used:
        return None
    names = [arm.name for arm in arms if arm.budget]
    colours = alt.Scale(domain=used, range=[TERM_COLOURS[words] for words in used])
    chart = _of_arms([v for v in values if v["term"] in used], names).mark_bar(stroke="#FFF", strokeWidth=0.5)
    chart = chart.encode(
        y=alt.Y("arm:N", sort=names, title=None),
        x=alt.X("ms:Q", title="mean ms to the first token, from schedule"),
        color=alt.Color("term:N", scale=colours, title=None),
        order="order:Q",
        tooltip=["arm:N", "term:N", alt.Tooltip("ms:Q", format=",.2f")],
    )
    caption = "Parts of the mean time to the first token, the same scale for all arms."
    return Picture(
        "Where the first token waited",
        caption,
        chart.properties(width="container", height=34 * len(names) + 10),
    )


def _slots(data: ReportData, arms: Sequence[ArmData]) -> Picture | None:
    """All arms over one time axis, one lane a slot; what is drawn half as high is computed for nothing."""
    lines = [(arm.name, arm.timeline) for arm in arms if arm.timeline]
    if not lines:
        return None
    spans_s = [line.span_s for _, line in lines]
    until_s = min(max(spans_s), TIMELINE_STRETCH * min(spans_s))
    values: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    top = 0.0
    lane_px = max(5.0, min(13.0, 480 / sum(line.num_lanes for _, line in lines)))
    for name, line in lines:
        top += 30 / lane_px
        shares = f"{line.live_share:.0%} live, {line.dead_share:.0%} dead rows, {line.idle_share:.0%} empty"
        head: dict[str, Any] = {
            "arm": name,
            "words": f"{name}: {shares}",
            "from": 0,
            "to": min(line.span_s, until_s),
        }
        heads.append({**head, "top": top, "bottom": top + line.num_lanes})
        for bar in line.bars[:MAX_BARS]:
            for start, end, phase in (
                (bar.joined_s, bar.first_token_s, "prompt"),
                (bar.first_token_s, bar.finished_s, "tokens"),
                (bar.finished_s, bar.left_s, "dead row"),
            ):
                if end > start and start < until_s:
                    inset = 0.35 if phase == "dead row" else 0.06
                    spot = {
                        "top": round(top + bar.lane + inset, 3),
                        "bottom": round(top + bar.lane + 0.94, 3),
                    }
                    times = {"from": round(start, 4), "to": round(min(end, until_s), 4)}
                    values.append({"arm": name, "request": bar.label, "phase": phase, **times, **spot})
        top += line.num_lanes
    y = alt.Y("top:Q", axis=None, scale=alt.Scale(domain=[0, top], reverse=True, nice=False))
    x = alt.X("from:Q", title="s since the first step", scale=alt.Scale(domain=[0, until_s], nice=False))
    phases = alt.Scale(domain=list(PHASE_COLOURS), range=list(PHASE_COLOURS.values()))
    own_keys = "[mousedown, window:mouseup] > window:mousemove!"
    zoom = alt.selection_interval(
        name="zoom", bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey || event.shiftKey]",
        translate=own_keys,
    )  # fmt: skip
    names = [name for name, _ in lines]
    lanes = _of_arms(heads, names).mark_rect(clip=True, fill=PHASE_COLOURS["empty"])
    bars = _of_arms(values, names).mark_rect(clip=True).encode(
        x=x, x2="to:Q", y=y, y2="bottom:Q", color=alt.Color("phase:N", scale=phases, title=None),
        tooltip=["request:N", "arm:N", "phase:N", alt.Tooltip("from:Q", format=".3f", title="from s"),
                 alt.Tooltip("to:Q", format=".3f", title="to s")],
    ).add_params(zoom)  # fmt: skip
    words = _of_arms(heads, names).mark_text(align="left", baseline="bottom", dy=-4, fontWeight=600)
    chart = alt.layer(
        lanes.encode(x=x, x2="to:Q", y=y, y2="bottom:Q"),
        bars,
        words.encode(x=alt.value(0), y=y, text="words:N"),
    )
    return Picture(
        "The batch over time, slot by slot",
        "One lane a slot, one time axis for all arms (long runs are cut), the first block of each. Full bars "
        "are work for an answer, half-high ones dead rows, grey is an empty slot. Shares: of slots x time.",
        chart.properties(width="container", height=round(top * lane_px)),
    )
