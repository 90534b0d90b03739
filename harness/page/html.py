"""One HTML page that opens offline: `report.html.j2` with charts, library, style and script inside.

No font, script or picture is fetched. Whatever comes from outside (names of arms, errors) is escaped: by the
template, and in the charts because it is JSON in which `<` is spelled as a code.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.comparing.contrasts import contrast_table
from harness.page.charts import make_charts
from harness.page.data import ReportData
from harness.page.picture import ARM_COLOURS, description, theme
from harness.page.summary import (
    arm_table,
    as_json,
    budget_table,
    command,
    contrast_sentences,
    figure_table,
    num_of,
    question,
    setting_lines,
    steady_table,
    verdict_sentences,
)
from harness.results.metrics import METRICS


def render_page(data: ReportData, title: str) -> str:
    kept = ("run_id", "arm", "model", "started_at", "seeds", "corpus", "schedule", "git", "packages", "path")
    told = [run.model_dump(mode="json", exclude_unset=True) for run in data.manifest.runs]
    charts = make_charts(data)
    first = next(name for name in ("verdict", "throughput-latency", "ttft-cdf", *charts) if name in charts)
    sentences = verdict_sentences(data)
    is_why = [sentence.startswith(("Time of the batch", "Where the first token")) for sentence in sentences]
    return TEMPLATES.get_template("report.html.j2").render(
        data=data,
        title=title,
        question=question(data),
        charts=charts,
        first=first,
        more=[name for name in charts if name not in (first, "slots", "budget")],
        specs={name: description(drawn, data.names, has_legend=False) for name, drawn in charts.items()},
        themes=[theme(), theme(is_dark=True)],
        library=_library(),
        colours=[ARM_COLOURS[i % len(ARM_COLOURS)] for i in range(len(data.names))],
        answer=[s for s, why in zip(sentences, is_why, strict=True) if not why],
        why=[s for s, why in zip(sentences, is_why, strict=True) if why],
        arm_table=arm_table(data),
        figure_table=figure_table(data),
        contrast_table=contrast_table(data.found),
        contrast_sentences=contrast_sentences(data.found),
        budget_table=budget_table(data),
        steady_table=steady_table(data),
        shares_clock=all(arm.budget.shares_clock for arm in data.arms if arm.budget),
        has_server_means=any(arm.budget.has_server_means for arm in data.arms if arm.budget),
        metrics=METRICS,
        meanings={figure.label: metric.description for metric in METRICS for figure in metric.figures},
        setting_lines=setting_lines(data),
        command=command(data),
        blocks=num_of(data.num_blocks, "block"),
        report=as_json(data),
        runs=[{name: run.get(name) for name in kept} for run in told],
    )


@cache
def _library() -> Markup:
    """Vega, Vega-Lite and Vega-Embed; 0.9 MB."""
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return Markup(re.sub("</(?=script)", r"<\\/", bundle, flags=re.IGNORECASE))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
