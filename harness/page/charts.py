"""Charts as SVG: axes, lines, points and stacked bars, readable on a phone and without colour.

What enters are numbers and names; what leaves is one `<svg>` string that stands alone. Series differ by
colour (Okabe and Ito's set, which the colour-blind tell apart), by dash and by marker. Knows no metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A", "#8B6F00")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "12 4", "1 4", "6 2 1 2")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "circle", "square", "triangle")
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 46
INK, GRID = "#222222", "#DDDDDD"
_FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"'


@dataclass(frozen=True, slots=True)
class Series:
    """`style` picks colour, dash and marker, so that an arm looks alike in every chart."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    has_line: bool = True
    has_markers: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    low: float
    high: float
    is_log: bool
    from_px: float
    to_px: float

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.from_px + (value - low) / (high - low) * (self.to_px - self.from_px)

    def ticks(self) -> list[float]:
        if not self.is_log:
            step = _nice_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [i * step for i in range(first, int(self.high / step + 1e-9) + 1)]
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if self.high / self.low < 300 else (1,)
        ticks = [f * 10.0**e for e in exponents for f in factors]
        return [t for t in ticks if self.low * 0.999 <= t <= self.high * 1.001]


def _nice_step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)


def scale_of(values: Sequence[float], *, is_log: bool, from_px: float, to_px: float) -> Scale:
    """Covers all values with a little room; a linear scale begins at 0."""
    usable = [v for v in values if math.isfinite(v) and (v > 0 or not is_log)] or [1.0]
    if is_log:
        return Scale(min(usable) / 1.12, max(usable) * 1.12, True, from_px, to_px)
    high = max(*usable, 1e-9) * 1.05
    return Scale(0.0, high, False, from_px, to_px)


def tick_text(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if value < 1 else f"{value:,.6g}"


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    y_high: float | None = None,
) -> str:
    """Lines and points over two axes, with a legend under them."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([y_high / 1.05] if y_high else [])
    x = scale_of(xs, is_log=log_x, from_px=LEFT, to_px=WIDTH - RIGHT)
    y = scale_of(ys, is_log=log_y, from_px=HEIGHT - BOTTOM, to_px=TOP)
    legend_rows = math.ceil(len(series) / 2)
    parts = [_axes(x, y, x_label, y_label)]
    parts += [_drawn(s, x, y) for s in series]
    parts += [_legend(s, i, HEIGHT + 8) for i, s in enumerate(series)]
    return svg(WIDTH, HEIGHT + 10 + 20 * legend_rows, title, parts)


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    parts: list[str] = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 6, at + 4, tick_text(value), anchor="end"))
    last = -math.inf
    for value in x.ticks():
        at = x(value)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        if at - last >= 34:
            parts.append(text(at, HEIGHT - BOTTOM + 17, tick_text(value), anchor="middle"))
            last = at
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(text(middle_x, HEIGHT - 8, x_label, anchor="middle", weight="600"))
    parts.append(
        f'<text transform="translate(14 {middle_y:.0f}) rotate(-90)" text-anchor="middle" font-size="13" '
        f'font-weight="600" fill="{INK}">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _drawn(series: Series, x: Scale, y: Scale) -> str:
    colour, dash = COLOURS[series.style % len(COLOURS)], DASHES[series.style % len(DASHES)]
    usable = [(a, b) for a, b in series.points if (a > 0 or not x.is_log) and (b > 0 or not y.is_log)]
    parts: list[str] = []
    if series.has_line and len(usable) > 1:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in usable)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2" '
            f'stroke-dasharray="{dash}"/>'
        )
    if series.has_markers:
        parts += [marker(series.style, x(a), y(b)) for a, b in usable]
    return f"<g><title>{escape(series.name + series.note)}</title>{''.join(parts)}</g>"


def _legend(series: Series, index: int, top: float) -> str:
    left, at = 14 + (index % 2) * (WIDTH // 2), top + 14 + 20 * (index // 2)
    colour, dash = COLOURS[series.style % len(COLOURS)], DASHES[series.style % len(DASHES)]
    line = f'<line x1="{left}" x2="{left + 30}" y1="{at - 4}" y2="{at - 4}" stroke="{colour}" '
    line += f'stroke-width="2.2" stroke-dasharray="{dash}"/>'
    sign = marker(series.style, left + 15, at - 4) if series.has_markers else ""
    return (line if series.has_line else "") + sign + text(left + 38, at, series.name)


def marker(style: int, x: float, y: float, size: float = 5.0) -> str:
    colour, kind = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>'
    s = size
    shapes = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "triangle": [(0, -s * 1.2), (s * 1.1, s), (-s * 1.1, s)],
        "diamond": [(0, -s * 1.4), (s * 1.2, 0), (0, s * 1.4), (-s * 1.2, 0)],
        "cross": [(-s, -s), (0, -1.5), (s, -s), (1.5, 0), (s, s), (0, 1.5), (-s, s), (-1.5, 0)],
    }
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[kind])
    return f'<polygon points="{points}" fill="{colour}"/>'


def text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, weight: str = "400"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{INK}">{escape(words)}</text>'
    )


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" {_FONT}>'
        f'<title>{escape(title)}</title><rect width="{width:g}" height="{height:g}" fill="#FFFFFF"/>'
        f"{''.join(parts)}</svg>"
    )
