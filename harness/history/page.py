"""The trend as one HTML page that opens offline: Vega is inside, nothing is fetched.

Names come from files, so all of them are escaped: by the template, and in the specifications, which are JSON
inside a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from altair.utils.schemapi import debug_mode

from harness.comparing.contrasts import ratio_text
from harness.history.change_points import FALSE_ALARM
from harness.history.charts import title_of, trend_chart
from harness.history.series import GROUP, SHOWN, Mark, chained, is_number, marks, nights
from harness.history.store import History
from harness.page.offline import templates, vega
from harness.results.metrics import FIGURES
from harness.results.output_dir import make_folder, whole_file

MAX_RATIO_LINES = 60
PICTURE_WIDTH = 900
CHAIN_WORDS = "ratios of commits measured in turns, chained; the oldest commit is 1"


@dataclass(frozen=True, slots=True)
class Trend:
    """One chart: `name` is its file name and its id."""

    name: str
    title: str
    spec: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One backend, model and load."""

    title: str
    trends: list[Trend]
    marks: list[Mark]


def make_parts(history: History) -> list[Part]:
    # Years of nights are more rows than altair takes by itself, and checking each part takes seconds a page.
    with alt.data_transformers.disable_max_rows(), debug_mode(False):
        return _parts(history)


def _parts(history: History) -> list[Part]:
    found = marks(history.rows)
    chains = chained(history.rows)
    parts: list[Part] = []
    for number, (key, own) in enumerate(nights(history.rows).groupby(GROUP)):
        here = [mark for mark in found if mark.group == tuple(map(str, key))]
        strategies = list(dict.fromkeys(own["strategy"]))
        trends = []
        of_ratios = chains[(chains[GROUP] == list(key)).all(axis=1)]
        for metric in SHOWN:
            rows = of_ratios[of_ratios["metric"] == metric]
            if not rows.empty:
                of_metric = [mark for mark in here if mark.metric == metric and mark.of_ratios]
                title = f"{title_of(FIGURES[metric])}: {CHAIN_WORDS}"
                spec = trend_chart(rows.assign(machine=""), of_metric, strategies)
                trends.append(Trend(f"{number}-{metric}-chain", title, spec))
        for metric in SHOWN:
            rows = own[own["metric"] == metric]
            if not rows.empty:
                of_metric = [mark for mark in here if mark.metric == metric and not mark.of_ratios]
                spec = trend_chart(rows, of_metric, strategies)
                trends.append(Trend(f"{number}-{metric}", title_of(FIGURES[metric]), spec))
        if trends:
            parts.append(Part(" - ".join(map(str, key)), trends, here))
    return parts


def write_page(history: History, path: Path) -> list[Part]:
    """
    Raises:
        LabError: the disk does not take it.
    """
    parts = make_parts(history)
    rows = history.rows
    specs = {trend.name: trend.spec for part in parts for trend in part.trends}
    page = _PAGE.render(
        parts=parts,
        num_nights=rows["started_at"].dt.date.nunique(),
        num_commits=rows["commit"].nunique(),
        first=rows["started_at"].min(),
        last=rows["started_at"].max(),
        damaged=history.damaged,
        false_alarm=FALSE_ALARM,
        label={metric: FIGURES[metric].label for metric in SHOWN},
        ratios=_ratio_lines(rows),
        script=vega(),
        specs=specs,
    )
    with whole_file(path) as file:
        file.write(page.encode(errors="replace"))
    return parts


def write_pictures(parts: Sequence[Part], folder: Path) -> list[Path]:
    """Every chart as PNG.

    Raises:
        LabError: the disk does not take one.
    """
    make_folder(folder)
    written = []
    for trend in (trend for part in parts for trend in part.trends):
        spec = trend.spec | {"width": PICTURE_WIDTH, "title": trend.title, "background": "white"}
        path = folder / f"{trend.name}.png"
        with whole_file(path) as file:
            file.write(vl_convert.vegalite_to_png(spec, scale=1.5))
        written.append(path)
    return written


def _ratio_lines(rows: pd.DataFrame) -> list[list[str]]:
    """The newest comparisons first: night, arm, against, figure, ratio."""
    compared = rows[(rows["kind"] == "comparison") & rows["metric"].isin(SHOWN)]
    newest = compared.sort_values(["started_at", "strategy"], ascending=[False, True]).head(MAX_RATIO_LINES)
    lines = []
    for row in newest.to_dict("records"):
        interval = f" [{row['low']:.3g}-{row['high']:.3g}]" if is_number(row["low"]) else ""
        told = (row["backend"], row["strategy"], row["against"], FIGURES[row["metric"]].label)
        night = f"{row['started_at']:%Y-%m-%d}"
        lines.append([night, *map(str, told), ratio_text(row["value"]) + interval, str(row["validity"])])
    return lines


_PAGE = templates(Path(__file__).parent).get_template("history.html.j2")
