"""Bars as SVG: where the time to the first token went, and which request held which slot when.

Every colour has a pattern or a label beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from harness.page.charts import COLOURS, Scale, tick_text
from harness.page.svg import GRID, INK, drawing, element, text
from harness.page.timeline import Timeline
from harness.results.latency_budget import TERMS

MAX_BARS = 600
TERM_COLOURS = {
    "chunk_ms": "#E69F00",
    "lag_ms": "#8B6F00",
    "connection_ms": "#000000",
    "network_ms": "#CC79A7",
    "queue_ms": "#56B4E9",
    "batch_wait_ms": "#D55E00",
    "prefill_ms": "#009E73",
    "delivery_ms": "#5A5A5A",
    "residual_ms": "#BBBBBB",
}
LIVE, PROMPT, DEAD, EMPTY = COLOURS[0], "#009E73", "#D55E00", "#F3F3F3"
_EDGE: dict[str, float | str] = {"stroke": "#FFFFFF", "stroke_width": 0.6}
_HATCH = element(
    "defs",
    element(
        "pattern",
        element("rect", width=5, height=5, fill="#F7D9C4"),
        element("rect", width=2, height=5, fill=DEAD),
        id="dead",
        width=5,
        height=5,
        patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)",
    ),
)


def budget_bars(arms: Sequence[tuple[str, Mapping[str, float]]], title: str) -> Markup:
    """One bar an arm: each term's part of the mean time to first token, and its length in ms."""
    left, width, row = 12, 460, 48
    labels = {**dict(TERMS), "residual_ms": "residual"}
    parts: list[Markup] = []
    used: set[str] = set()
    top = 6
    for arm, means in arms:
        total = sum(means.values())
        parts.append(text(left, top + 14, arm, weight=600))
        parts.append(text(width - left, top + 14, f"{total:,.1f} ms", anchor="end", weight=600))
        at = float(left)
        for name, label in labels.items():
            part = means[name] / total if total > 0 else 0.0
            length = max(0.0, part) * (width - 2 * left)
            if part > 0.0005:
                used.add(name)
            if length < 0.15:
                continue
            note = element("title", f"{label}: {means[name]:,.2f} ms ({part:.1%})")
            bar = _block(
                at, top + 20, length, 18, TERM_COLOURS[name], note, stroke="#FFFFFF", stroke_width=0.6
            )
            parts.append(bar)
            if length > 46:
                shade = INK if name in ("queue_ms", "chunk_ms", "residual_ms") else "#FFFFFF"
                words = f"{part:.0%}"
                parts.append(text(at + length / 2, top + 33, words, anchor="middle", size=12, fill=shade))
            at += length
        top += row
    for name in (name for name in labels if name in used):
        top += 19
        parts.append(_block(left, top - 11, 14, 12, TERM_COLOURS[name]))
        parts.append(text(left + 22, top, labels[name]))
    return drawing(width, top + 12, title, parts)


def lanes(timeline: Timeline, title: str, until_s: float) -> Markup:
    """Slots as lanes, requests as bars; hatched where a finished row was computed on."""
    left, right, width = 12, 750, 760
    height = max(6.0, min(14.0, 240 / timeline.num_lanes))
    top = 8.0
    bottom = top + height * timeline.num_lanes
    x = Scale(0.0, until_s, False, left, right)
    parts = [_HATCH, _block(left, top, x(min(until_s, timeline.span_s)) - left, bottom - top, EMPTY)]
    for bar in timeline.bars[:MAX_BARS]:
        for start, end, fill, what in (
            (bar.joined_s, bar.first_token_s, PROMPT, "prompt"),
            (bar.first_token_s, bar.finished_s, LIVE, "tokens"),
            (bar.finished_s, bar.left_s, "url(#dead)", "dead"),
        ):
            if end - start <= 0 or start > until_s:
                continue
            length = max(0.4, x(min(end, until_s)) - x(start))
            note = element("title", f"{bar.label}: {what} {start:.2f}-{end:.2f} s")
            parts.append(_block(x(start), top + bar.lane * height + 0.8, length, height - 1.6, fill, note))
    for value in x.ticks():
        at = x(value)
        parts.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 5, stroke=INK))
        parts.append(text(at, bottom + 18, f"{tick_text(value)} s", anchor="middle", size=12))
    parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, stroke=GRID))
    return drawing(width, bottom + 24, title, parts)


def lane_legend() -> Markup:
    parts = [_HATCH]
    meanings = ((PROMPT, "prompt"), (LIVE, "tokens"), ("url(#dead)", "dead row"), (EMPTY, "empty slot"))
    for index, (fill, words) in enumerate(meanings):
        at = 12 + index * 112
        parts.append(_block(at, 6, 18, 12, fill, stroke=GRID))
        parts.append(text(at + 24, 17, words))
    return drawing(460, 24, "what the bars mean", parts)


def _block(
    x: float, y: float, width: float, height: float, fill: str, *inside: Markup, **more: float | str
) -> Markup:
    return element("rect", *inside, x=x, y=y, width=width, height=height, fill=fill, **more)
