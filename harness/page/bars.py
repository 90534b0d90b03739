"""Bars as SVG: where the time to the first token went, and which request held which slot when.

What enters are budgets and timelines; what leaves are `<svg>` strings that stand alone. Every colour has a
pattern or a label beside it. Derives no figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.page.charts import COLOURS, GRID, INK, Scale, svg, text, tick_text
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
_HATCH = (
    '<defs><pattern id="dead" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)">'
    f'<rect width="5" height="5" fill="#F7D9C4"/><rect width="2" height="5" fill="{DEAD}"/></pattern></defs>'
)


def budget_bars(arms: Sequence[tuple[str, Mapping[str, float]]], title: str) -> str:
    """One bar an arm: each term's part of the mean time to first token, and its length in ms."""
    left, width, row = 12, 460, 48
    names = [*(name for name, _ in TERMS), "residual_ms"]
    labels = {**dict(TERMS), "residual_ms": "residual"}
    used = [name for name in names if any(means[name] > 0.0005 * _total(means) for _, means in arms)]
    parts: list[str] = []
    top = 6
    for arm, means in arms:
        total = _total(means)
        parts.append(text(left, top + 14, arm, weight="600"))
        parts.append(text(width - 12, top + 14, f"{total:,.1f} ms", anchor="end", weight="600"))
        at = float(left)
        for name in names:
            length = max(0.0, means[name]) / total * (width - 24) if total > 0 else 0.0
            if length < 0.15:
                continue
            note = f"{labels[name]}: {means[name]:,.2f} ms ({means[name] / total:.1%})"
            parts.append(
                f'<rect x="{at:.1f}" y="{top + 20}" width="{length:.1f}" height="18" stroke="#FFFFFF" '
                f'stroke-width="0.6" fill="{TERM_COLOURS[name]}"><title>{note}</title></rect>'
            )
            if length > 46:
                shade = "#FFFFFF" if name not in ("queue_ms", "chunk_ms", "residual_ms") else INK
                parts.append(
                    f'<text x="{at + length / 2:.1f}" y="{top + 33}" text-anchor="middle" font-size="12" '
                    f'fill="{shade}">{means[name] / total:.0%}</text>'
                )
            at += length
        top += row
    for name in used:
        top += 19
        parts.append(f'<rect x="{left}" y="{top - 11}" width="14" height="12" fill="{TERM_COLOURS[name]}"/>')
        parts.append(text(left + 22, top, labels[name]))
    return svg(width, top + 12, title, parts)


def _total(means: Mapping[str, float]) -> float:
    return sum(means.values())


def lanes(timeline: Timeline, title: str, until_s: float) -> str:
    """Slots as lanes, requests as bars; hatched where a finished row was computed on."""
    left, right, width = 12, 10, 760
    height = max(6.0, min(14.0, 240 / timeline.num_lanes))
    top = 8.0
    bottom = top + height * timeline.num_lanes
    x = Scale(0.0, until_s, False, left, width - right)
    parts = [
        _HATCH,
        f'<rect x="{left}" y="{top}" width="{x(min(until_s, timeline.span_s)) - left:.1f}" '
        f'height="{bottom - top:.1f}" fill="{EMPTY}"/>',
    ]
    for bar in timeline.bars[:MAX_BARS]:
        y = top + bar.lane * height
        for start, end, fill, what in (
            (bar.joined_s, bar.first_token_s, PROMPT, "prompt"),
            (bar.first_token_s, bar.finished_s, LIVE, "tokens"),
            (bar.finished_s, bar.left_s, "url(#dead)", "dead"),
        ):
            if end - start <= 0 or start > until_s:
                continue
            length = max(0.4, x(min(end, until_s)) - x(start))
            note = f"{bar.label}: {what} {start:.2f}-{end:.2f} s"
            parts.append(
                f'<rect x="{x(start):.1f}" y="{y + 0.8:.1f}" width="{length:.1f}" '
                f'height="{height - 1.6:.1f}" fill="{fill}"><title>{note}</title></rect>'
            )
    for value in x.ticks():
        at = x(value)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.0f}" y2="{bottom + 5:.0f}" stroke="{INK}"/>'
        )
        parts.append(text(at, bottom + 18, f"{tick_text(value)} s", anchor="middle", size=12))
    parts.append(
        f'<line x1="{left}" x2="{width - right}" y1="{bottom:.0f}" y2="{bottom:.0f}" stroke="{GRID}"/>'
    )
    return svg(width, bottom + 24, title, parts)


def lane_legend() -> str:
    parts = [_HATCH]
    for place, (fill, words) in enumerate(
        ((PROMPT, "prompt"), (LIVE, "tokens"), ("url(#dead)", "dead row"), (EMPTY, "empty slot"))
    ):
        at = 12 + place * 112
        parts.append(f'<rect x="{at}" y="6" width="18" height="12" fill="{fill}" stroke="{GRID}"/>')
        parts.append(text(at + 24, 17, words))
    return svg(460, 24, "what the bars mean", parts)
