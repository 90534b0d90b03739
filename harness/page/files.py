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
    names = () if data.manifest.validity.invalid else ("verdict", "throughput-latency", "ttft-cdf", *charts)
    first = next((name for name in names if name in charts), None)
    budgets = [arm.budget for arm in data.arms if arm.budget]
    figure_table, note = _without_like_gaps(summary.figure_table(data))
    figures = [(figure, metric) for metric in METRICS for figure in metric.figures]
    return TEMPLATES.get_template("report.html.j2").render(
        data=data,
        told=summary,
        charts=charts,
        first=first,
        more=[name for name in charts if name not in (first, "slots", "budget")],
        specs={name: description(drawn, data.names) for name, drawn in charts.items()},
        themes=[theme(), theme(is_dark=True)],
        library=vega(),
        colours=cycled(data.names, ARM_COLOURS)["range"],
        contrast_table=contrast_table(data.found),
        contrast_lines=told_once(verdict_lines(data.found)),
        figure_table=figure_table,
        note_of_gaps=note,
        shares_clock=all(budget.shares_clock for budget in budgets),
        has_server_means=any(budget.has_server_means for budget in budgets),
        metrics=METRICS,
        meanings={f"{figure.label}{unit}": m.description for figure, m in figures for unit in ("", " (ms)")},
    )


def told_once(lines: Sequence[str]) -> list[str]:
    """Arms of which the same is told share a line."""
    arms_of: dict[str, list[str]] = {}
    for line in lines:
        arm, _, told = line.partition(": ")
        arms_of.setdefault(told, []).append(arm)
    return [f"{', '.join(arms)}: {told}" for told, arms in arms_of.items()]


def _without_like_gaps(table: summary.Table) -> tuple[summary.Table, str]:
    """Gaps between frames are ITL where no frame held several tokens: one of them is enough."""
    headers, lines = table
    cells = {f"gap {label.removeprefix('ITL ')}": of for label, *of in lines if label.startswith("ITL ")}
    kept = [line for line in lines if cells.get(line[0]) != line[1:]]
    return (headers, kept), "Gaps left out are equal to ITL." if len(kept) < len(lines) else ""


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
    spec = description(picture, names, width=width)
    with whole_file(path) as file:
        if path.suffix == ".png":
            file.write(vl_convert.vegalite_to_png(spec, config=theme(), scale=2))
        else:
            file.write(vl_convert.vegalite_to_svg(spec, config=theme()).encode())


def write_slide(data: ReportData, path: Path) -> None:
    """One picture of 1,200 x 675 that stands alone: the question, the answer, how sure, one chart or two;
    no chart of runs that do not count."""
    validity = data.manifest.validity
    first, *more = summary.answer_sentences(data)
    leader = data.decision.first if data.decision else "Against"
    kept = ("Against", "It comes", f"{leader} ", "How sure", "Next")
    sentences = [words for words in more if words.startswith(kept)]
    question, answer = _lines(summary.question(data), 110, 2), _lines(first, 72, 4)
    sure = _lines(" ".join(sentences), 125, 4)
    reasons = [*validity.invalid, *validity.caution]
    doubts = _lines("; ".join(reasons), 118, 2)
    if validity.invalid:
        doubts = [line for reason in reasons for line in _lines(reason, 118, 2)][:18]
    high = 524 - 24 * len(question) - 30 * len(answer) - 20 * (len(sure) + len(doubts))
    charts = {} if validity.invalid else make_charts(data)
    if "slots" in charts and (slots := slots_chart(data.first_load, high - 160 - 44 * len(data.first_load))):
        charts["slots"] = slots
    names = [name for name in ("verdict", "slots", "throughput-latency", "ttft-cdf") if name in charts][:2]
    svg = TEMPLATES.get_template("slide.svg.j2").render(
        question=question, answer=answer, sure=sure, doubts=doubts, level=validity.level, high=high,
        pictures=[_small(charts[name], data.names, high - 140) for name in names],
        setting=[line for words in summary.setting_lines(data)[:3] for line in _lines(words, 170, 1)],
    )  # fmt: skip
    with whole_file(path) as file:
        file.write(vl_convert.svg_to_png("\n".join(map(printable, svg.split("\n"))), scale=1))


def _lines(words: str, width: int, most: int) -> list[str]:
    return wrap(words, width, max_lines=most, placeholder=" …")


def _small(drawn: Picture, names: Sequence[str], height: int) -> Markup:
    """A chart whose size its surroundings set."""
    spec = description(drawn, names, width=540)
    spec["height"] = max(height, 0.6 * spec["height"])
    svg = vl_convert.vegalite_to_svg(spec, config=theme())
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
        parts.append(listed([markdown_text(f"{line}.") for line in told_once(verdict_lines(data.found))]))
    parts += summary.length_lines(data)
    if (budgets := summary.budget_table(data))[1]:
        parts.append(table(*budgets))
    parts.append(listed([markdown_text(line) for line in summary.setting_lines(data)]))
    parts.append(listed([markdown_text(reason) for reason in validity.reasons()]))
    return "\n\n".join(part for part in parts if part)
