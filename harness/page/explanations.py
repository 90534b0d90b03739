"""The charts that explain: how the first arm stands, where the first token waited, who held which slot when.

Phases (of a slot, of the time to the first token) have Tol's light colours, and no arm has one of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from harness.comparing.trade import factor_text
from harness.page.data import ArmData, ReportData
from harness.page.picture import Picture, Spec, hover, of_arms, quantity
from harness.results.latency_budget import TERMS

MAX_BARS = 300
TIMELINE_STRETCH = 3.0
"""All arms show as much time as this many of the shortest, so that single steps stay visible."""
PHASE_COLOURS = {"prompt": "#44BB99", "tokens": "#77AADD", "dead row": "#EE8866", "empty": "#B0B0B040"}
_TERM_COLOURS = (
    "#EEDD88", "#AAAA00", "#C8C8C8", "#99DDFF", "#BBCC33", "#EE8866", "#44BB99", "#FFAABB", "#8C8C8C",
)  # fmt: skip
_WORDS = {
    "better": ("#009E73", "triangle-right"),
    "worse": ("#D55E00", "triangle-left"),
    "equivalent": ("#0072B2", "square"),
    "can't tell": ("#8A8A8A", "circle"),
}


def verdict_chart(data: ReportData) -> Picture | None:
    """The first arm against the reference: how many times better or worse, and how sure."""
    made = data.decision
    told = (made.against_reference or made.against_next) if made else []
    values: list[dict[str, Any]] = []
    for contrast in told:
        if (verdict := contrast.verdict) is not None:
            ratios = (verdict.ratio, *(verdict.interval or ()))
            if not contrast.figure.metric.higher_is_better:
                ratios = tuple(1 / ratio for ratio in ratios)
            figure, factor = contrast.figure.label, factor_text(max(ratios[0], 1 / ratios[0]))
            said = f"{factor} {verdict.word}" if verdict.word in ("better", "worse") else verdict.word
            values.append({
                "figure": figure, "word": verdict.word, "ratio": contrast.text(), "verdict": verdict.text(),
                "said": f"{figure}: {said}", "x": ratios[0], "low": min(ratios), "high": max(ratios),
            })  # fmt: skip
    if not values or made is None:
        return None
    # Few blocks give intervals over many powers of ten: the axis keeps to what the ratios need.
    far = 1.5 * max(max(v["x"], 1 / v["x"]) for v in values)
    ticks = (
        "datum.value == 1 ? 'same' : format(max(datum.value, 1 / datum.value), '.3~r') + "
        "(datum.value < 1 ? 'x worse' : 'x better')"
    )
    marked = [tick for tick in (1, 1.25, 2, 5, 10, 30, 100, 300, 1000) if tick <= far]
    x = {
        "type": "quantitative", "title": None,
        "scale": {"type": "log", "domain": [1 / far, far], "clamp": True, "nice": False},
        "axis": {"labelExpr": ticks, "values": sorted({*marked, *(1 / tick for tick in marked)}),
                 "labelOverlap": "greedy", "labelSeparation": 10, "grid": False},
    }  # fmt: skip
    words = {word: look for word, look in _WORDS.items() if any(v["word"] == word for v in values)}
    looks = [
        {"field": "word", "title": None, "scale": {"domain": list(words), "range": list(of)}}
        for of in zip(*words.values(), strict=True)
    ]
    margin = 1 + next(c.verdict.margin for c in told if c.verdict)
    once: Spec = {"data": {"values": [{}]}}
    no_rows: Spec = {"y": None, "tooltip": None}
    layers = [
        {**once, "mark": {"type": "rect", "color": "#88888833"},
         "encoding": {**no_rows, "x": {"datum": 1 / margin, **x}, "x2": {"datum": margin}}},
        {**once, "mark": {"type": "rule", "strokeDash": [4, 3]},
         "encoding": {**no_rows, "x": {"datum": 1, **x}}},
        {"mark": {"type": "rule", "strokeWidth": 3},
         "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}, "color": looks[0]}},
        {"mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
         "encoding": {"x": {"field": "x", **x}, "color": looks[0], "shape": looks[1]}},
        {"mark": {"type": "text", "dy": -13, "align": "left", "fontWeight": 600},
         "encoding": {"x": {"value": 0}, "text": {"field": "said"}}},
    ]  # fmt: skip
    return Picture(
        f"{made.first} against {data.reference if made.against_reference else made.second}",
        f"Right of the dashed line is better; the bars are intervals that hold together at 95%. An interval "
        f"inside the grey band, {margin - 1:.0%} either way, is equivalent.",
        {
            "data": {"values": values},
            "height": 42 * len(values),
            "encoding": {
                "y": {"field": "figure", "sort": None, "axis": None},
                "tooltip": hover("figure", "ratio", "verdict"),
            },
            "layer": layers,
        },
        is_of_arms=False,
    )


def budget_chart(arms: Sequence[ArmData]) -> Picture | None:
    labels = dict((*TERMS, ("residual_ms", "residual")))
    means = {arm.name: arm.budget.means() for arm in arms if arm.budget}
    used = [name for name in labels if any(of[name] > 0.0005 for of in means.values())]
    if not used:
        return None
    values = [
        {"arm": arm, "term": labels[name], "ms": max(0.0, of[name]), "order": place}
        for arm, of in means.items()
        for place, name in enumerate(labels)
        if name in used
    ]
    colours = dict(zip(labels, _TERM_COLOURS, strict=True))
    scale = {"domain": [labels[name] for name in used], "range": [colours[name] for name in used]}
    spec = of_arms(values) | {
        "height": 34 * len(means) + 10,
        "mark": {"type": "bar", "stroke": "#FFF", "strokeWidth": 0.5},
        "encoding": {
            "y": {"field": "arm", "sort": list(means), "title": None},
            "x": quantity("ms", "mean ms to the first token, from schedule"),
            "color": {"field": "term", "title": None, "scale": scale},
            "order": {"field": "order"},
            "tooltip": hover("arm", "term", ms="ms"),
        },
    }
    caption = "Parts of the mean time to the first token, the same scale for all arms."
    return Picture("Where the first token waited", caption, spec, is_of_arms=False)


def slots_chart(arms: Sequence[ArmData], lanes_px: float = 480) -> Picture | None:
    """All arms over one time axis, one lane a slot; what is drawn half as high is computed for nothing.

    `lanes_px` is how high all lanes together may be.
    """
    lines = [(arm.name, arm.timeline) for arm in arms if arm.timeline]
    if not lines:
        return None
    spans_s = [line.span_s for _, line in lines]
    # Bars that are left out would look like empty slots: time ends where the first of them begins.
    left_out_s = [line.bars[MAX_BARS].joined_s for _, line in lines if len(line.bars) > MAX_BARS]
    until_s = min(max(spans_s), TIMELINE_STRETCH * min(spans_s), *left_out_s)
    lane_px = max(2.0, min(13.0, lanes_px / sum(line.num_lanes for _, line in lines)))
    bars: list[Spec] = []
    heads: list[Spec] = []
    top = 0.0
    for name, line in lines:
        top += 44 / lane_px
        shares = f"{line.live_share:.0%} live, {line.dead_share:.0%} dead rows, {line.idle_share:.0%} empty"
        heads.append({
            "arm": name, "words": [name, shares], "from": 0, "to": min(line.span_s, until_s),
            "top": top, "bottom": top + line.num_lanes,
        })  # fmt: skip
        for lane, label, *stamps_s in line.bars[:MAX_BARS]:
            for phase, (start_s, end_s) in zip(PHASE_COLOURS, pairwise(stamps_s), strict=False):
                if end_s > start_s and start_s < until_s:
                    inset = 0.35 if phase == "dead row" else 0.06
                    bars.append({
                        "arm": name, "request": label, "phase": phase,
                        "from": round(start_s, 4), "to": round(min(end_s, until_s), 4),
                        "top": round(top + lane + inset, 3), "bottom": round(top + lane + 0.94, 3),
                    })  # fmt: skip
        top += line.num_lanes
    zoom = {
        "name": "zoom", "bind": "scales",
        "select": {
            "type": "interval", "encodings": ["x"], "zoom": "wheel![event.ctrlKey || event.shiftKey]",
            "translate": "[mousedown, window:mouseup] > window:mousemove!",
        },
    }  # fmt: skip
    phases = {"domain": list(PHASE_COLOURS), "range": list(PHASE_COLOURS.values())}
    across = {"domain": [0, until_s], "nice": False}
    down = {"domain": [0, top], "reverse": True, "nice": False}
    encoding = {
        "x": quantity("from", "s since the first step", scale=across), "x2": {"field": "to"},
        "y": quantity("top", axis=None, scale=down), "y2": {"field": "bottom"},
    }  # fmt: skip
    layers = [
        of_arms(heads) | {
            "mark": {"type": "rect", "clip": True, "fill": PHASE_COLOURS["empty"]}, "encoding": encoding,
        },
        of_arms(bars) | {
            "mark": {"type": "rect", "clip": True}, "params": [zoom],
            "encoding": encoding | {
                "color": {"field": "phase", "title": None, "scale": phases},
                "tooltip": hover("request", "arm", "phase", **{"from": "from s", "to": "to s"}),
            },
        },
        of_arms(heads) | {
            "mark": {"type": "text", "align": "left", "baseline": "bottom", "dy": -18, "fontWeight": 600},
            "encoding": {"x": {"value": 0}, "y": encoding["y"], "text": {"field": "words"}},
        },
    ]  # fmt: skip
    return Picture(
        "The batch over time, slot by slot",
        "One lane a slot, one time axis for all arms (long runs are cut), the first block of each. Full bars "
        "are work for an answer, half-high ones dead rows, grey is an empty slot. Shares: of slots x time.",
        {"height": round(top * lane_px), "layer": layers},
        is_of_arms=False,
    )
