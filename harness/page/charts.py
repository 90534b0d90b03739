"""Lines and points over two axes, as SVG that is readable on a phone and without colour.

Series differ by colour (Okabe and Ito's set, which the colour-blind tell apart), by dash and by marker.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from harness.page.svg import GRID, drawing, element, text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A", "#8B6F00")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "12 4", "1 4", "6 2 1 2")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "circle", "square", "triangle")
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 46
_SIZE = 5.0
_SHAPES: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1.2), (1.1, 1), (-1.1, 1)],
    "diamond": [(0, -1.4), (1.2, 0), (0, 1.4), (-1.2, 0)],
    "cross": [(-1, -1), (0, -0.3), (1, -1), (0.3, 0), (1, 1), (0, 0.3), (-1, 1), (-0.3, 0)],
}
"""Corners of a marker, in halves of its size."""


@dataclass(frozen=True, slots=True)
class Series:
    """`style` picks colour, dash and marker, so that an arm looks alike in every chart."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    has_line: bool = True
    has_markers: bool = False


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
) -> Markup:
    """The legend stands under the axes, two names a line."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([y_high / 1.05] if y_high else [])
    x = scale_of(xs, is_log=log_x, from_px=LEFT, to_px=WIDTH - RIGHT)
    y = scale_of(ys, is_log=log_y, from_px=HEIGHT - BOTTOM, to_px=TOP)
    parts = _axes(x, y, x_label, y_label)
    parts += [_drawn(s, x, y) for s in series]
    for index, s in enumerate(series):
        parts += _legend(s, 14 + index % 2 * WIDTH // 2, HEIGHT + 22 + index // 2 * 20)
    return drawing(WIDTH, HEIGHT + 10 + 20 * math.ceil(len(series) / 2), title, parts)


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> list[Markup]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[Markup] = []
    for value in y.ticks():
        at = y(value)
        parts.append(element("line", x1=LEFT, x2=right, y1=at, y2=at, stroke=GRID))
        parts.append(text(LEFT - 6, at + 4, tick_text(value), anchor="end"))
    last = -math.inf
    for value in x.ticks():
        at = x(value)
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=bottom, stroke=GRID))
        if at - last >= 34:  # narrower, and the numbers would run into each other
            parts.append(text(at, bottom + 17, tick_text(value), anchor="middle"))
            last = at
    middle = f"translate(14 {(TOP + bottom) / 2:.0f}) rotate(-90)"
    parts.append(text((LEFT + right) / 2, HEIGHT - 8, x_label, anchor="middle", weight=600))
    parts.append(text(0, 0, y_label, anchor="middle", weight=600, transform=middle))
    return parts


def _drawn(series: Series, x: Scale, y: Scale) -> Markup:
    points = [(x(a), y(b)) for a, b in series.points if (a > 0 or not x.is_log) and (b > 0 or not y.is_log)]
    parts = [element("title", series.name)]
    if series.has_line and len(points) > 1:
        parts.append(element("polyline", points=_joined(points), fill="none", **_stroke(series.style)))
    if series.has_markers:
        parts += [marker(series.style, *point) for point in points]
    return element("g", *parts)


def _legend(series: Series, left: int, at: int) -> Iterator[Markup]:
    if series.has_line:
        yield element("line", x1=left, x2=left + 30, y1=at - 4, y2=at - 4, **_stroke(series.style))
    if series.has_markers:
        yield marker(series.style, left + 15, at - 4)
    yield text(left + 38, at, series.name)


def _stroke(style: int) -> dict[str, float | str]:
    dash = DASHES[style % len(DASHES)]
    return {"stroke": COLOURS[style % len(COLOURS)], "stroke_width": 2.2, "stroke_dasharray": dash}


def marker(style: int, x: float, y: float) -> Markup:
    colour, kind = COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]
    if kind == "circle":
        return element("circle", cx=x, cy=y, r=_SIZE, fill=colour)
    points = [(x + dx * _SIZE, y + dy * _SIZE) for dx, dy in _SHAPES[kind]]
    return element("polygon", points=_joined(points), fill=colour)


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
