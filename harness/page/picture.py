"""What every chart is made of, and the whole Vega-Lite description of one.

Arms have the colours of Okabe and Ito, and a shape and a dash each. What comes from outside is data in a
description, never a field name or an expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    is_of_arms: bool = True
    """Whether its colours are the arms, whose legend the page has once above all charts."""


def theme(*, is_dark: bool = False) -> Spec:
    """What a description leaves open; the page has both."""
    ink, grid = ("#E6E6E6", "#3A3F47") if is_dark else ("#222222", "#DDDDDD")
    words = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    legend = {"orient": "bottom", "columns": 2, "labelLimit": 300, "symbolLimit": 30, "symbolStrokeWidth": 0}
    return {
        "background": None if is_dark else "#FFFFFF",
        "font": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif",
        "aria": False,
        "axis": {**words, "gridColor": grid, "domainColor": grid, "tickColor": grid, "labelLimit": 190},
        "legend": words | legend,
        "text": {"color": ink, "fontSize": 12},
        "title": {"color": ink},
        "rule": {"color": ink},
        "view": {"stroke": None},
    }


def description(
    picture: Picture, names: Sequence[str], *, has_legend: bool, width: int | str = "container"
) -> Spec:
    """A whole Vega-Lite description. The page has the title and the legend of arms outside the charts."""
    spec = {"width": width, "autosize": {"type": "fit-x", "contains": "padding"}, **picture.spec}
    if has_legend:
        spec["title"] = {"text": picture.title, "anchor": "start"}
    elif picture.is_of_arms:
        spec["config"] = {"legend": {"disable": True}}
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
