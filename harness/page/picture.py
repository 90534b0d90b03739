"""What every chart is made of, and the whole Vega-Lite description of one.

Arms have the colours of Okabe and Ito, and a shape and a dash each. What comes from outside is data in a
description, never a field name or an expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

Spec = dict[str, Any]

ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#A08000")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "stroke")
DASHES = ([1, 0], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2], [12, 4], [1, 4], [6, 2, 1, 2])


@dataclass(frozen=True, slots=True)
class Picture:
    """`caption` says what is to be seen; it is the text of those who see no picture."""

    title: str
    caption: str
    spec: Spec


def theme(*, is_dark: bool = False) -> Spec:
    """What a description leaves open; the page has both."""
    ink, grid = ("#E6E6E6", "#3A3F47") if is_dark else ("#222222", "#DDDDDD")
    words = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    axis = {"gridColor": grid, "domainColor": grid, "tickColor": grid, "labelLimit": 190}
    apart = {"labelFlush": False, "labelBound": 10, "labelOverlap": "greedy", "labelSeparation": 8}
    return {
        "background": None if is_dark else "#FFFFFF",
        "font": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif",
        "aria": False,
        "padding": {"left": 5, "right": 12, "top": 5, "bottom": 5},
        "axis": words | axis | apart,
        "axisX": {"titleAnchor": "end"},
        "legend": words | {"orient": "bottom", "columns": 2, "labelLimit": 300, "symbolLimit": 30},
        "text": {"color": ink, "fontSize": 12},
        "title": {"color": ink, "subtitleColor": ink, "subtitleFontSize": 11, "subtitlePadding": 5},
        "rule": {"color": ink},
        "tick": {"color": ink},
        "view": {"stroke": None},
    }


def description(picture: Picture, names: Sequence[str], *, width: int | None = None) -> Spec:
    """A whole Vega-Lite description; without a width, for the page, which has title and caption itself."""
    fit = {"type": "fit-x", "contains": "padding"}
    spec = {"width": width or "container", "autosize": fit, **picture.spec}
    if width:
        # A letter of the caption is about 6 px wide.
        below = wrap(picture.caption, width // 6)
        spec["title"] = {"text": picture.title, "anchor": "start", "subtitle": below}
    # The arms that the reader left switched on; charts drop the others.
    spec["params"] = [{"name": "shown", "value": list(names)}, *spec.get("params", ())]
    return spec


def of_arms(values: Sequence[Mapping[str, Any]]) -> Spec:
    """The data of a chart or layer whose values have an `arm`."""
    return {"data": {"values": values}, "transform": [{"filter": "indexof(shown, datum.arm) >= 0"}]}


def quantity(field: str, title: str | None = None, **more: Any) -> Spec:
    """A channel of numbers."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def cycled(names: Sequence[str], of: Sequence[Any]) -> Spec:
    """The scale that gives each name one of these."""
    return {"domain": list(names), "range": [of[i % len(of)] for i in range(len(names))]}


def hover(*words: str, **numbers: str) -> list[Spec]:
    """What a pointer over a mark shows: fields of text, and those of numbers with their titles."""
    plain = [{"field": field, "title": field} for field in words]
    return [*plain, *(quantity(field, title, format=",.4~r") for field, title in numbers.items())]
