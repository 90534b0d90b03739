"""One HTML page that opens offline: `report.html.j2` with charts, style and script inside.

No font, script or picture is fetched. Whatever comes from outside (names of arms, errors) is escaped: by the
template, and in the drawings by `svg.element`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.comparing.contrasts import contrast_table
from harness.page.bars import budget_bars, lane_legend, lanes
from harness.page.charts import Series, chart
from harness.page.data import ArmData, ReportData
from harness.page.summary import (
    arm_table,
    budget_table,
    contrast_sentences,
    setting_lines,
    verdict_sentences,
)
from harness.results.formulas import Floats

MAX_CURVE_POINTS = 160
MAX_NAME_CHARS = 60
TIMELINE_STRETCH = 3.0
"""All timelines show as much time as this many of the shortest, so that single steps stay visible."""


def make_charts(data: ReportData) -> dict[str, Markup]:
    """All single charts by file name, in the order of the page."""
    style = {name: index for index, name in enumerate(data.names)}
    charts = {"throughput-latency": _throughput_latency(data, style)}
    arms = _of_first_load(data)
    kind = "ITL" if all(arm.itl_is_per_token for arm in arms) else "inter-chunk latency"
    for name, title, latencies in (
        ("ttft-cdf", "time to first token, from schedule (ms)", [arm.ttft_ms for arm in arms]),
        ("itl-cdf", f"{kind} (ms)", [arm.itl_ms for arm in arms]),
        ("total-cdf", "whole answer, from schedule (ms)", [arm.total_ms for arm in arms]),
    ):
        pairs = zip(arms, latencies, strict=True)
        series = [Series(arm.name, _cdf(values), style[arm.name]) for arm, values in pairs if len(values)]
        if series:
            charts[name] = chart(title, series, title, "share of requests", log_x=True, y_high=1.0)
    if data.slo is not None and len(data.loads) > 1:
        good = [(arm.name, arm.offered, arm.goodput_per_s) for arm in data.arms]
        series = [
            Series(
                name,
                sorted((load, rate) for arm, load, rate in good if arm == name and rate is not None),
                style[name],
                has_markers=True,
            )
            for name in data.names
        ]
        unit = "requests/s asked for" if data.is_open else "users"
        charts["goodput"] = chart("goodput over load", series, unit, "goodput (requests/s)")
    if budgets := [(arm.name, arm.budget.means()) for arm in arms if arm.budget]:
        charts["budget"] = budget_bars(budgets, "where the time to the first token went")
    timelines = [(arm, arm.timeline) for arm in arms if arm.timeline]
    spans_s = [timeline.span_s for _, timeline in timelines]
    names = _timeline_names(data)
    for arm, timeline in timelines:
        shown_s = min(max(spans_s), TIMELINE_STRETCH * min(spans_s))
        charts[names[arm.name]] = lanes(timeline, f"slots of {arm.name}", shown_s)
    return charts


def _throughput_latency(data: ReportData, style: dict[str, int]) -> Markup:
    """One point a run; a line through the medians of the loads where there are several."""
    series: list[Series] = []
    for name in data.names:
        own = sorted((arm for arm in data.arms if arm.name == name), key=lambda arm: arm.offered)
        if len(own) > 1:
            points = [
                (arm.middle_tokens_per_s, float(np.median(arm.ttft_ms))) for arm in own if len(arm.ttft_ms)
            ]
        else:
            points = list(zip(own[0].tokens_per_s, own[0].ttft_p50_ms, strict=True))
        series.append(Series(name, points, style[name], has_line=len(own) > 1, has_markers=True))
    return chart(
        "throughput and latency", series, "output tokens/s", "TTFT p50, from schedule (ms)", log_y=True
    )


def _cdf(values: Floats) -> list[tuple[float, float]]:
    indices = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_CURVE_POINTS)).astype(int))
    return [(float(values[i]), (int(i) + 1) / len(values)) for i in indices]


def render_page(data: ReportData, title: str) -> str:
    kept = ("run_id", "arm", "model", "started_at", "seeds", "corpus", "schedule", "git", "packages", "path")
    told = [run.model_dump(mode="json", exclude_unset=True) for run in data.manifest.runs]
    costs = [[arm.name, arm.load, f"{arm.usd_per_million_tokens or 0:,.2f}"] for arm in data.arms]
    names = _timeline_names(data)
    return _PAGE.render(
        data=data,
        title=title,
        charts=make_charts(data),
        verdict_sentences=verdict_sentences(data),
        arm_table=arm_table(data),
        contrast_table=contrast_table(data.found),
        contrast_sentences=contrast_sentences(data.found),
        budget_table=budget_table(data),
        shares_clock=all(arm.budget.shares_clock for arm in data.arms if arm.budget),
        lane_legend=lane_legend(),
        timelines=[(names[arm.name], arm) for arm in _of_first_load(data) if arm.timeline],
        cost_table=(["arm", "load", "USD per million output tokens"], costs),
        setting_lines=setting_lines(data),
        runs=[{name: run.get(name) for name in kept} for run in told],
    )


def _of_first_load(data: ReportData) -> list[ArmData]:
    return [arm for arm in data.arms if arm.load == data.arms[0].load]


def _timeline_names(data: ReportData) -> dict[str, str]:
    """By arm. They are names of files too, and an arm may hold a path to a model, of any length."""
    names: dict[str, str] = {}
    for arm in data.names:
        stem = name = "timeline-" + re.sub(r"[^\w.,=@+-]", "-", arm)[:MAX_NAME_CHARS]
        number = 1
        while name in names.values():
            name = f"{stem}-{(number := number + 1)}"
        names[arm] = name
    return names


_PAGE = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
).get_template("report.html.j2")
