"""What every chart is made of: its parts and colours, and the whole Vega-Lite description of one.

Arms have the colours of Okabe and Ito, and a shape each. What comes from outside is data in a description,
never a field name or an expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#A08000")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "stroke")


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
        _drop_arm_legends(chart, list(names))
    if width is not None:
        chart |= {"width": width, "title": {"text": picture.title, "anchor": "start"}}
    params = [{"name": "shown", "value": list(names)}, *chart.get("params", ())]
    return {**chart, "params": params, "autosize": {"type": "fit-x", "contains": "padding"}}


def _drop_arm_legends(part: Any, names: list[str]) -> None:
    if isinstance(part, dict):
        for name in ("color", "shape"):
            channel = part.get(name)
            if not isinstance(channel, dict) or channel.get("field") != "arm":
                continue
            if channel["scale"]["domain"] == names:
                channel["legend"] = None
        for inner in ("layer", "encoding"):
            _drop_arm_legends(part.get(inner), names)
    elif isinstance(part, list):
        for inner in part:
            _drop_arm_legends(inner, names)


def of_arms(values: Sequence[Mapping[str, Any]], names: Sequence[str]) -> alt.Chart:
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
