"""The trend of one figure as a Vega-Lite chart: a line and a band for each strategy, a rule for each change.

Colours of text and grid are not set here: the page sets them for light and for dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from harness.history.series import Mark
from harness.results.metrics import Figure

# After Okabe and Ito (2008), the blue lighter: told apart by the colour-blind, on light and on dark.
COLOURS = ("#2B8CD0", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#F0E442")
HEIGHT = 240
FEW_NIGHTS = 10
"""Up to so many each has its date on the axis; few days may hold no Sunday, where weeks have their tick."""


def title_of(figure: Figure) -> str:
    unit = "" if figure.q is None else f" ({figure.metric.unit})"
    better = "higher" if figure.metric.higher_is_better else "lower"
    return f"{figure.label}{unit}, {better} is better"


def trend_chart(rows: pd.DataFrame, found: Sequence[Mark], strategies: Sequence[str]) -> dict[str, Any]:
    """The specification, of width `container`; `rows` are the nights of one figure and group."""
    shown = [
        "started_at", "strategy", "value", "low", "high", "commit", "validity", "reason", "machine",
        "num_requests", "num_blocks",
    ]  # fmt: skip
    data = rows[shown].assign(night=rows["started_at"].dt.floor("D"))
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(strategies))]
    colour = alt.Color(
        "strategy:N",
        scale=alt.Scale(domain=list(strategies), range=colours),
        legend=alt.Legend(title=None, symbolOpacity=1),
    )
    picked = alt.selection_point(fields=["strategy"], bind="legend")
    # The arms of one night stand above one another.
    nights = data["night"].drop_duplicates().sort_values()
    ticks = (
        {"tickCount": "week"}
        if len(nights) > FEW_NIGHTS
        else {"values": [int(at.timestamp() * 1000) for at in nights]}
    )
    night = alt.X("night:T", title=None, axis=alt.Axis(format="%b %d", labelOverlap=True, **ticks))
    scale = alt.Scale(zero=False, nice=True)
    base = alt.Chart(data).encode(x=night, color=colour)
    faint = alt.condition(picked, alt.value(1.0), alt.value(0.1))
    # A line would join two machines as if the code had changed. INVALID nights are points alone.
    counted = base.transform_filter("datum.validity != 'INVALID'")
    band = counted.mark_area(opacity=0.18, line=False).encode(
        y=alt.Y("low:Q", title=None, scale=scale),
        y2="high:Q",
        detail="machine:N",
        opacity=alt.condition(picked, alt.value(0.18), alt.value(0.02)),
    )
    line = counted.mark_line(strokeWidth=1.5).encode(
        y=alt.Y("value:Q", title=None, scale=scale), detail="machine:N", opacity=faint
    )
    points = base.mark_point(filled=True, size=28).encode(
        y=alt.Y("value:Q", scale=scale),
        shape=alt.Shape(
            "validity:N",
            scale=alt.Scale(domain=["VALID", "CAUTION", "INVALID"], range=["circle", "triangle-up", "cross"]),
            legend=None,
        ),
        opacity=faint,
        tooltip=[
            alt.Tooltip("started_at:T", format="%Y-%m-%d %H:%M", title="UTC"),
            *(alt.Tooltip(name, format=",.4~g") for name in ("value:Q", "low:Q", "high:Q")),
            *(f"{name}:N" for name in ("strategy", "commit", "validity", "reason", "machine")),
            *(f"{name}:Q" for name in ("num_requests", "num_blocks")),
        ],
    )
    layers: list[alt.Chart] = [band, line, points.add_params(picked)]
    if len(nights) < 2:  # a band of one night has no width
        layers.append(counted.mark_rule().encode(y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"))
    if found:
        marked = alt.Chart(
            pd.DataFrame(
                {
                    "night": [mark.at.floor("D") for mark in found],
                    "strategy": [mark.strategy for mark in found],
                    "change": [f"{mark.ratio - 1:+.1%}" for mark in found],
                    "commit": [mark.commit for mark in found],
                }
            )
        ).encode(x=night, color=colour, tooltip=["strategy:N", "change:N", "commit:N"])
        layers += [
            marked.mark_rule(strokeDash=[4, 3], strokeWidth=1.5),
            marked.mark_text(align="left", dx=4, baseline="top", fontWeight="bold").encode(
                y=alt.value(2), text="change:N"
            ),
        ]
    chart = alt.layer(*layers).properties(width="container", height=HEIGHT)
    made: dict[str, Any] = chart.to_dict(validate=False)
    return made
