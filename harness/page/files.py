"""Result files as one report: HTML, Markdown, single charts, or one slide.

The page opens offline: no font, script or picture is fetched. Whatever comes from outside (names of arms,
errors) is escaped: by the template, and in the charts because it is JSON in which `<` is spelled as a code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Literal, get_args

import vl_convert
from markupsafe import Markup

from adapters.text.unicode_text import printable
from harness.comparing.comparison import RANKS_TEXT, interval_table, verdict_lines
from harness.comparing.contrasts import contrast_table
from harness.page import summary
from harness.page.charts import make_charts
from harness.page.data import ReportData
from harness.page.explanations import slots_chart
from harness.page.offline import templates, vega
from harness.page.picture import ARM_COLOURS, Picture, cycled, description, theme
from harness.results.metrics import METRICS
from harness.results.output_dir import make_folder, whole_file
from harness.results.table import markdown_text, render_table

ChartKind = Literal["png", "svg"]
CHART_KINDS: tuple[ChartKind, ...] = get_args(ChartKind)
CHART_WIDTH = 560
TEMPLATES = templates(Path(__file__).parent)


def render_page(data: ReportData) -> str:
    charts = make_charts(data)
    first = next(name for name in ("verdict", "throughput-latency", "ttft-cdf", *charts) if name in charts)
    budgets = [arm.budget for arm in data.arms if arm.budget]
    figures = [(figure, metric) for metric in METRICS for figure in metric.figures]
    return TEMPLATES.get_template("report.html.j2").render(
        data=data,
        told=summary,
        charts=charts,
        first=first,
        more=[name for name in charts if name not in (first, "slots", "budget")],
        specs={name: description(drawn, data.names, has_legend=False) for name, drawn in charts.items()},
        themes=[theme(), theme(is_dark=True)],
        library=vega(),
        colours=cycled(data.names, ARM_COLOURS)["range"],
        contrast_table=contrast_table(data.found),
        contrast_lines=verdict_lines(data.found),
        shares_clock=all(budget.shares_clock for budget in budgets),
        has_server_means=any(budget.has_server_means for budget in budgets),
        metrics=METRICS,
        meanings={f"{figure.label}{unit}": m.description for figure, m in figures for unit in ("", " (ms)")},
    )


def write_html(data: ReportData, path: Path) -> None:
    """
    Raises:
        LabError: the disk does not take it.
    """
    page = render_page(data).encode(errors="replace")
    with whole_file(path) as file:
        file.write(page)


def write_charts(data: ReportData, folder: Path, kind: ChartKind) -> list[Path]:
    """Every chart as a file of its own, on white, with its title and legend."""
    make_folder(folder)
    written: list[Path] = []
    for name, drawn in make_charts(data).items():
        width = 1000 if name == "slots" else CHART_WIDTH
        path = folder / f"{name}.{kind}"
        write_picture(drawn, path, names=data.names, width=width)
        written.append(path)
    return written


def write_picture(
    picture: Picture, path: Path, *, names: Sequence[str] = (), width: int = CHART_WIDTH
) -> None:
    """PNG where the file's name says so, else SVG."""
    spec = description(picture, names, has_legend=True, width=width)
    with whole_file(path) as file:
        if path.suffix == ".png":
            file.write(vl_convert.vegalite_to_png(spec, config=theme(), scale=2))
        else:
            file.write(vl_convert.vegalite_to_svg(spec, config=theme()).encode())


def write_slide(data: ReportData, path: Path) -> None:
    """One picture of 1,200 x 675 that stands alone: the question, the answer, how sure, one chart or two."""
    charts = make_charts(data)
    if (slots := slots_chart(data.first_load, lanes_px=130)) is not None:
        charts["slots"] = slots
    names = [name for name in ("verdict", "slots", "throughput-latency", "ttft-cdf") if name in charts][:2]
    answer = summary.answer_sentences(data)
    validity = data.manifest.validity
    svg = TEMPLATES.get_template("slide.svg.j2").render(
        question=wrap(summary.question(data), 110)[:2],
        answer=wrap(answer[0], 72)[:4],
        sure=wrap(" ".join(s for s in answer[1:] if s.startswith(("Against", "How sure", "Next"))), 125)[:3],
        level=validity.level,
        doubts=wrap("; ".join((*validity.invalid, *validity.caution)), 125)[:1],
        pictures=[_small(charts[name], data.names) for name in names],
        setting=[line for words in summary.setting_lines(data)[:3] for line in wrap(words, 170)[:1]],
    )
    with whole_file(path) as file:
        file.write(vl_convert.svg_to_png("\n".join(map(printable, svg.split("\n"))), scale=1))


def _small(drawn: Picture, names: Sequence[str]) -> Markup:
    """A chart whose size its surroundings set."""
    svg = vl_convert.vegalite_to_svg(description(drawn, names, has_legend=True, width=540), config=theme())
    at_top = ' preserveAspectRatio="xMinYMin"'
    return Markup(re.sub(r' width="[\d.]+" height="[\d.]+"', at_top, svg, count=1))


def to_markdown(data: ReportData) -> str:
    """For a pull request: the answer, the tables, the doubts."""
    validity = data.manifest.validity

    def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
        return render_table(headers, [[markdown_text(cell) for cell in line] for line in lines])

    def listed(lines: Sequence[str]) -> str:
        return "\n".join(f"- {line}" for line in lines)

    parts = [
        f"### {markdown_text(summary.title(data))}",
        f"**{validity.level}.** " + markdown_text(" ".join(summary.verdict_sentences(data))),
        table(*summary.arm_table(data)),
        RANKS_TEXT,
        table(*interval_table({summary.arm_at(data, arm): arm.intervals for arm in data.arms})),
        "The steady window, while load was as asked:",
        table(*summary.steady_table(data)),
    ]
    if data.found:
        told = f"Ratios to {markdown_text(str(data.reference))}; intervals hold together at 95%."
        parts += [f"Latencies from schedule. {told}", table(*contrast_table(data.found))]
        parts.append(listed([markdown_text(f"{line}.") for line in verdict_lines(data.found)]))
    parts += summary.length_lines(data)
    if (budgets := summary.budget_table(data))[1]:
        parts.append(table(*budgets))
    parts.append(listed([markdown_text(line) for line in summary.setting_lines(data)]))
    parts.append(listed([markdown_text(reason) for reason in validity.reasons()]))
    return "\n\n".join(part for part in parts if part)
