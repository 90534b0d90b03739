"""The charts that explain: how the first arm stands, where the first token waited, who held which slot when.

Phases (of a slot, of the time to the first token) have Tol's light colours, and no arm has one of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import altair as alt

from harness.comparing.contrasts import Contrast
from harness.comparing.trade import phrase_of
from harness.page.data import ArmData, ReportData
from harness.page.picture import Picture, of_arms
from harness.results.latency_budget import TERMS

MAX_BARS = 300
TIMELINE_STRETCH = 3.0
"""All arms show as much time as this many of the shortest, so that single steps stay visible."""
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


def verdict_chart(data: ReportData) -> Picture | None:
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
        is_sure = verdict.word in ("better", "worse")
        row["said"] = phrase_of(contrast) if is_sure else verdict.text().partition(":")[0]
        row["verdict"] = verdict.text()
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
        tooltip=[alt.Tooltip(f"{name}:N", title=name) for name in ("figure", "ratio", "verdict")],
    )
    colours = alt.Scale(domain=words, range=[WORD_COLOURS[word] for word in words])
    coloured = base.encode(color=alt.Color("word:N", scale=colours, title=None))
    scale = alt.Scale(type="log", domain=[1 / far, far], clamp=True)
    x = alt.X(
        "x:Q",
        title=None,
        axis=alt.Axis(labelExpr=words_of_tick, tickCount=4, labelOverlap="greedy", labelSeparation=10),
        scale=scale,
    )
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


def budget_chart(arms: Sequence[ArmData]) -> Picture | None:
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
    chart = of_arms([v for v in values if v["term"] in used], names).mark_bar(stroke="#FFF", strokeWidth=0.5)
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


def slots_chart(data: ReportData, arms: Sequence[ArmData]) -> Picture | None:
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
    lanes = of_arms(heads, names).mark_rect(clip=True, fill=PHASE_COLOURS["empty"])
    bars = of_arms(values, names).mark_rect(clip=True).encode(
        x=x, x2="to:Q", y=y, y2="bottom:Q", color=alt.Color("phase:N", scale=phases, title=None),
        tooltip=["request:N", "arm:N", "phase:N", alt.Tooltip("from:Q", format=".3f", title="from s"),
                 alt.Tooltip("to:Q", format=".3f", title="to s")],
    ).add_params(zoom)  # fmt: skip
    words = of_arms(heads, names).mark_text(align="left", baseline="bottom", dy=-4, fontWeight=600)
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
