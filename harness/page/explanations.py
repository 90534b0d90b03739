"""The charts that explain: how the first arm stands, where the first token waited, who held which slot when.

Phases (of a slot, of the time to the first token) are brown, purple and crimson, which no arm is; neighbours
differ in how light they are, so that they are told apart without their hues.
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
PHASE_COLOURS = {"prompt": "#C8A27C", "tokens": "#8E6CC8", "dead row": "#B8155A", "empty": "#B0B0B040"}
TERM_COLOURS = (
    "#E8DCC4", "#D9CDF2", "#4A2C17", "#C79A6B", "#B79AE0", "#5E3A99", "#8B5E3C", "#D2B48C", "#D8D8DC",
)  # fmt: skip
_WORDS = {
    "better": ("#009E73", "triangle-up"),
    "worse": ("#D55E00", "triangle-down"),
    "equivalent": ("#0072B2", "square"),
    "can't tell": ("#8A8A8A", "circle"),
}


def _towards(ratio: float) -> str:
    """In the words of the axis, as: 1.25x worse."""
    return f"{factor_text(max(ratio, 1 / ratio))} {'better' if ratio > 1 else 'worse'}"


def verdict_chart(data: ReportData) -> Picture | None:
    """The first arm against the reference: how many times better or worse, and how sure."""
    made = data.decision
    told = (made.against_reference or made.against_next) if made else []
    judged = [(contrast, contrast.verdict) for contrast in told if contrast.verdict]
    if not judged or made is None or data.manifest.validity.invalid:
        return None
    values: list[dict[str, Any]] = []
    for contrast, verdict in judged:
        # The table has words instead of an interval that says nothing.
        interval = verdict.interval if verdict.interval and "-" in verdict.interval_text() else None
        towards = 1 if contrast.figure.metric.higher_is_better else -1
        at, *ends = (ratio**towards for ratio in (verdict.ratio, *(interval or ())))
        said = f"{verdict.word}, {_towards(at)} [{verdict.interval_text()}]"
        if verdict.word in ("better", "worse"):
            factor, *of = (value if at > 1 else 1 / value for value in (at, *ends))
            said = f"{factor_text(factor)} {verdict.word} [{min(of):.3g}-{max(of):.3g}]"
        elif ends:
            said = f"{verdict.word}, {_towards(min(ends))} to {_towards(max(ends))}"
        values.append({
            "figure": contrast.figure.label, "word": verdict.word, "ratio": contrast.text(), "x": at,
            "verdict": verdict.text(), "said": f"{contrast.figure.label}: {said}",
            "low": min((at, *ends)), "high": max((at, *ends)),
        })  # fmt: skip
    # Few blocks give intervals over many powers of ten: the axis keeps to what the ratios need.
    far = 1.5 * max(max(v["x"], 1 / v["x"]) for v in values)
    values = [v | {"from": max(v["low"], 1 / far), "to": min(v["high"], far)} for v in values]
    ticks = (
        "datum.value == 1 ? 'same' : format(max(datum.value, 1 / datum.value), '.3~r') + "
        "(datum.value < 1 ? 'x worse' : 'x better')"
    )
    marked = [tick for tick in (1, 1.25, 2, 5, 10, 30, 100, 300, 1000) if tick <= far]
    x = {
        "type": "quantitative", "title": None,
        "scale": {"type": "log", "domain": [1 / far / 1.06, far * 1.06], "nice": False},
        "axis": {"labelExpr": ticks, "values": sorted({*marked, *(1 / tick for tick in marked)}),
                 "labelSeparation": 10, "grid": False},
    }  # fmt: skip
    y = {
        "field": "figure", "sort": None, "axis": None,
        "scale": {"paddingInner": 0.5, "paddingOuter": 0.3, "align": 1},
    }  # fmt: skip
    colour, shape = (
        {"field": "word", "legend": None, "scale": {"domain": list(_WORDS), "range": list(of)}}
        for of in zip(*_WORDS.values(), strict=True)
    )
    margin = 1 + judged[0][1].margin
    arrows = [
        {"transform": [{"filter": f"datum.{end} {beyond} {at}"}],
         "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1, "shape": f"triangle-{side}"},
         "encoding": {"x": {"datum": at, **x}, "color": colour}}
        for end, beyond, at, side in (("low", "<", 1 / far, "left"), ("high", ">", far, "right"))
    ]  # fmt: skip
    layers = [
        {"mark": {"type": "rect", "color": "#88888833"},
         "encoding": {"x": {"datum": 1 / margin, **x}, "x2": {"datum": margin}}},
        {"mark": {"type": "tick", "thickness": 1.5}, "encoding": {"x": {"datum": 1, **x}}},
        {"mark": {"type": "rule", "strokeWidth": 3},
         "encoding": {"x": {"field": "from", **x}, "x2": {"field": "to"}, "color": colour}},
        *arrows,
        {"mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
         "encoding": {"x": {"field": "x", **x}, "color": colour, "shape": shape}},
        {"mark": {"type": "text", "align": "left", "baseline": "bottom", "dy": -3, "fontWeight": 600},
         "encoding": {"x": {"value": 0}, "y": {**y, "bandPosition": 0}, "text": {"field": "said"}}},
    ]  # fmt: skip
    return Picture(
        f"{made.first} against {data.reference if made.against_reference else made.second}",
        f"Right of the line is better. Bars: intervals that hold together at 95%; an arrow: it goes on. An "
        f"interval inside the grey band, {margin - 1:.0%} either way, is equivalent.",
        {
            "data": {"values": values},
            "height": 54 * len(values),
            "encoding": {"y": y, "tooltip": hover("figure", "ratio", "verdict")},
            "layer": layers,
        },
    )


def budget_chart(arms: Sequence[ArmData]) -> Picture | None:
    labels = {name: words.partition(" (")[0] for name, words in (*TERMS, ("residual_ms", "residual"))}
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
    colours = dict(zip(labels, TERM_COLOURS, strict=True))
    scale = {"domain": [labels[name] for name in used], "range": [colours[name] for name in used]}
    spec = of_arms(values) | {
        "height": 34 * len(means) + 10,
        "mark": {"type": "bar", "stroke": "#FFF", "strokeWidth": 0.5},
        "encoding": {
            "y": {"field": "arm", "sort": list(means), "title": None},
            "x": quantity("ms", "mean ms to the first token", axis={"tickCount": 10}),
            "color": {"field": "term", "title": None, "scale": scale},
            "order": {"field": "order"},
            "tooltip": hover("arm", "term", ms="ms"),
        },
    }
    caption = "Parts of the mean time to the first token, from schedule, the same scale for all arms."
    return Picture("Where the first token waited", caption, spec)


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
    seen = [phase for phase in PHASE_COLOURS if phase == "empty" or any(b["phase"] == phase for b in bars)]
    phases = {"domain": seen, "range": [PHASE_COLOURS[phase] for phase in seen]}
    across = {"domain": [0, until_s], "nice": False}
    down = {"domain": [0, top], "reverse": True, "nice": False}
    encoding = {
        "x": quantity("from", "s since the first step", scale=across, axis={"tickCount": 12}),
        "x2": {"field": "to"},
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
    )
