"""One HTML page that opens offline: `report.html.j2` with charts, library, style and script inside.

No font, script or picture is fetched. Whatever comes from outside (names of arms, errors) is escaped: by the
template, and in the charts because it is JSON in which `<` is spelled as a code.
"""

from __future__ import annotations

from pathlib import Path

from harness.comparing.contrasts import contrast_table
from harness.page.charts import make_charts
from harness.page.data import ReportData
from harness.page.offline import templates, vega
from harness.page.picture import ARM_COLOURS, description, theme
from harness.page.summary import (
    answer_sentences,
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
    why,
)
from harness.results.metrics import METRICS


def render_page(data: ReportData, title: str) -> str:
    kept = ("run_id", "arm", "model", "started_at", "seeds", "corpus", "schedule", "git", "packages", "path")
    told = [run.model_dump(mode="json", exclude_unset=True) for run in data.manifest.runs]
    charts = make_charts(data)
    first = next(name for name in ("verdict", "throughput-latency", "ttft-cdf", *charts) if name in charts)
    return TEMPLATES.get_template("report.html.j2").render(
        data=data,
        title=title,
        question=question(data),
        charts=charts,
        first=first,
        more=[name for name in charts if name not in (first, "slots", "budget")],
        specs={name: description(drawn, data.names, has_legend=False) for name, drawn in charts.items()},
        themes=[theme(), theme(is_dark=True)],
        library=vega(),
        colours=[ARM_COLOURS[i % len(ARM_COLOURS)] for i in range(len(data.names))],
        answer=answer_sentences(data),
        why=why(data),
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


TEMPLATES = templates(Path(__file__).parent)
