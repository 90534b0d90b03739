"""Result files as one report: HTML, Markdown, JSON, single charts, or one slide.

One schedule in all files makes a comparison with a reference, several make curves over load.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Literal, get_args

import vl_convert
from markupsafe import Markup

from adapters.base import ConfigError
from harness.comparing.combine import (
    ResultFile,
    choose_reference,
    comparison_manifest,
    join_runs,
    schedules_differ,
    validity_of,
)
from harness.comparing.comparison import agreement_of_all
from harness.comparing.contrasts import contrast_table
from harness.page.charts import make_charts
from harness.page.data import ReportData, gather
from harness.page.html import TEMPLATES, render_page
from harness.page.picture import Picture, description, theme
from harness.page.summary import (
    arm_table,
    budget_table,
    contrast_sentences,
    length_lines,
    question,
    setting_lines,
    verdict_sentences,
)
from harness.results.cost import Price
from harness.results.manifest import ComparisonManifest, Validity
from harness.results.metrics import Figure
from harness.results.output_dir import make_folder, whole_file
from harness.results.slo import Slo
from harness.results.table import markdown_text, render_table

ChartKind = Literal["png", "svg"]
CHART_KINDS: tuple[ChartKind, ...] = get_args(ChartKind)
CHART_WIDTH = 560


def load_report(
    files: Sequence[ResultFile],
    *,
    slo: Slo,
    price: Price,
    reference: str | None,
    margin: float,
    objective: Figure | None = None,
) -> ReportData:
    """Everything that these files say. INVALID ones are shown, and marked.

    Raises:
        ConfigError: the reference is not in them, or no row is.
    """
    runs, rows = join_runs(files)
    if rows.empty:
        raise ConfigError("the result files hold no row: nothing was measured, or the rows were taken out")
    has_loads = schedules_differ(runs)
    kept = files[0].manifest if len(files) == 1 else None
    asked = kept if isinstance(kept, ComparisonManifest) else None
    # Runs stand in the order in which they were measured, arms in the one in which they were asked for.
    arms = asked.arms if asked else list(dict.fromkeys(run.arm for run in runs))
    runs.sort(key=lambda run: arms.index(run.arm))
    # An interrupted comparison may not have come to its reference.
    kept_reference = asked.reference if asked and asked.reference in arms else None
    chosen = choose_reference(arms, reference or kept_reference)
    validity = validity_of(runs, len(runs))
    if has_loads:
        different = "the runs had different schedules"
        validity = Validity(
            tuple(r for r in validity.invalid if not r.startswith(different)), validity.caution
        )
    num_blocks = int(rows.groupby("arm")["repeat"].nunique().max())
    manifest = comparison_manifest(runs, arms, chosen, num_blocks, validity)
    same = (0, 0) if has_loads else agreement_of_all(rows)
    return gather(rows, manifest, slo=slo, price=price, margin=margin, num_same=same, objective=objective)


def write_html(data: ReportData, path: Path) -> None:
    """
    Raises:
        LabError: the disk does not take it.
    """
    page = render_page(data, _title(data)).encode(errors="replace")
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
    names = [name for name in ("verdict", "slots", "throughput-latency", "ttft-cdf") if name in charts][:2]
    pictures: list[Markup] = []
    for name in names:
        spec = description(charts[name], data.names, has_legend=True, width=540)
        if name == "slots":
            spec["height"] = 300
        drawn = vl_convert.vegalite_to_svg(spec, config=theme())
        pictures.append(Markup(re.sub(r' width="[\d.]+" height="[\d.]+"', "", drawn, count=1)))
    answer = verdict_sentences(data)
    sure = [s for s in answer[1:] if s.startswith(("Against", "No winner", "How sure"))]
    validity = data.manifest.validity
    doubts = (*validity.invalid, *validity.caution)
    svg = TEMPLATES.get_template("slide.svg.j2").render(
        question=wrap(question(data), 110)[:2],
        answer=wrap(answer[0], 72)[:4],
        sure=wrap(" ".join(sure), 125)[:3],
        level=validity.level,
        doubts=wrap("; ".join(doubts), 125)[:1],
        pictures=pictures,
        setting=[
            " ".join(line) if (line := wrap(words, 170)[:1]) else "" for words in setting_lines(data)[:3]
        ],
    )
    with whole_file(path) as file:
        file.write(vl_convert.svg_to_png(svg, scale=1))


def to_markdown(data: ReportData) -> str:
    """For a pull request: the answer, the tables, the doubts."""
    validity = data.manifest.validity
    parts = [
        f"### {markdown_text(_title(data))}",
        f"**{validity.level}.** " + markdown_text(" ".join(verdict_sentences(data))),
    ]
    parts.append(_table(*arm_table(data)))
    if data.found:
        reference = markdown_text(str(data.reference))
        parts.append(f"Latencies from schedule. Ratios to {reference}; intervals hold together at 95%.")
        parts.append(_table(*contrast_table(data.found)))
        parts.append("\n".join(f"- {markdown_text(sentence)}" for sentence in contrast_sentences(data.found)))
    parts += length_lines(data)
    headers, lines = budget_table(data)
    if lines:
        parts.append(_table(headers, lines))
    parts.append("\n".join(f"- {markdown_text(line)}" for line in setting_lines(data)))
    reasons = [
        *(f"INVALID: {r}" for r in validity.invalid),
        *(f"caution: {r}" for r in validity.caution),
    ]
    if reasons:
        parts.append("\n".join(f"- {reason}" for reason in reasons))
    return "\n\n".join(parts)


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return render_table(headers, [[markdown_text(cell) for cell in line] for line in lines])


def _title(data: ReportData) -> str:
    model = data.manifest.runs[0].model
    return (
        f"{', '.join(data.names)} on {model}" if len(data.names) < 7 else f"{len(data.names)} arms on {model}"
    )
