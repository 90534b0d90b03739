"""`lab report`: prints what result files say, and writes an HTML page that opens offline, charts or a slide.

A file is parquet, or the journal that a killed run left behind; `--recover` turns a journal into the
parquet it would have become, and a damaged parquet file into one of its whole rows. A journal is in no page.
Step logs, which a glob finds beside the rows, are passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from adapters.base import LabError
from adapters.text.unicode_text import printable
from harness.commands.options import (
    add_objective_option,
    add_slo_option,
    chosen_objective,
    parse_share,
    without_steps,
)
from harness.comparing.combine import ResultFile, read_result
from harness.comparing.comparison import render_comparison
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.page.data import load_report
from harness.page.files import CHART_KINDS, to_markdown, write_charts, write_html, write_slide
from harness.page.summary import as_json
from harness.results.cost import read_price
from harness.results.formulas import throughput
from harness.results.lengths import lengths_in_words
from harness.results.manifest import ComparisonManifest, RunManifest, Validity
from harness.results.metrics import METRICS, Figure
from harness.results.record import JOURNAL_SUFFIX, read_journal, to_frame
from harness.results.recovery import known_damage, recover, recover_damaged
from harness.results.server_lines import server_lines
from harness.results.slo import Slo, goodput
from harness.results.stats import MIN_SAMPLES, mean_of
from harness.results.steady import FIGURES as STEADY_FIGURES
from harness.results.steady import steady_figures
from harness.results.table import MISSING, number, render_table, share, spread
from harness.results.validity import judge

NO_LIMITS = Slo()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="parquet files, or journals")
    parser.add_argument(
        "--recover",
        action="store_true",
        help=f"turn *{JOURNAL_SUFFIX} of killed runs, and what is whole of damaged files, into parquet first",
    )
    add_slo_option(parser)
    add_objective_option(parser)
    parser.add_argument(
        "--html", type=Path, metavar="PATH", help="where the page goes (default: beside FILE)"
    )
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--markdown", action="store_true", help="print Markdown for a pull request, no page")
    printed.add_argument("--json", action="store_true", help="print the report's numbers as JSON, no page")
    for kind in CHART_KINDS:
        parser.add_argument(
            f"--{kind}", type=Path, metavar="FOLDER", help=f"write every chart as {kind.upper()} as well"
        )
    parser.add_argument(
        "--slide", type=Path, metavar="PATH", help="write a summary of one slide, a PNG of 1,200 x 675"
    )
    parser.add_argument("--baseline", metavar="NAME", help="arm that ratios refer to")
    parser.add_argument(
        "--margin", type=parse_share, default=DEFAULT_MARGIN, metavar="SHARE", help="default 5%%"
    )
    for name, of in (
        ("price-per-hour-usd", "of this machine"),
        ("price-per-token-usd", "of an output token"),
    ):
        parser.add_argument(
            f"--{name}", type=float, metavar="USD", help=f"price {of}, for the cost per million"
        )


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when a file is INVALID, 2 when one cannot be read."""
    status = 0
    slo = Slo(tuple(args.slo))
    readable: list[ResultFile] = []
    for given in without_steps(args.files):
        path = given
        try:
            if args.recover:
                path = recover_damaged(path) if path.suffix == ".parquet" else recover(path)
            file = read_rows(path)
        except LabError as error:
            print(f"lab report: {error}", file=sys.stderr)
            status = 2
            continue
        if not file.path.name.endswith(JOURNAL_SUFFIX):
            readable.append(file)
        if not (args.markdown or args.json):
            print(_text_of(file, slo, args.margin, chosen_objective(args)), end="\n\n")
        validity = file.manifest.validity
        if isinstance(file.manifest, RunManifest) and validity is None:
            validity = judge(file.rows, file.manifest)
        if validity is not None and validity.invalid:
            status = max(status, 1)
    if readable:
        _write_report(readable, slo, args)
    return status


def _text_of(file: ResultFile, slo: Slo, margin: float, objective: Figure | None) -> str:
    path, manifest, rows = file
    if isinstance(manifest, ComparisonManifest):
        return render_comparison(rows, manifest, margin, objective)
    return render_report(rows, manifest, judge(rows, manifest), path, slo)


def _write_report(files: list[ResultFile], slo: Slo, args: argparse.Namespace) -> None:
    price = read_price(args.price_per_hour_usd, args.price_per_token_usd)
    data = load_report(
        files,
        slo=slo,
        price=price,
        reference=args.baseline,
        margin=args.margin,
        objective=chosen_objective(args),
    )
    if not data.manifest.runs or not any(arm.figures["ttft_p50_ms"] is not None for arm in data.arms):
        return
    if args.markdown:
        print(to_markdown(data))
    elif args.json:
        print(json.dumps(as_json(data), indent=2))
    else:
        page = args.html or files[0].path.with_suffix(".html")
        write_html(data, page)
        print(f"report: {page}")
    for kind in CHART_KINDS:
        if folder := getattr(args, kind):
            print(f"{len(write_charts(data, folder, kind))} charts: {folder}", file=sys.stderr)
    if args.slide:
        write_slide(data, args.slide)
        print(f"slide: {args.slide}", file=sys.stderr)


def read_rows(path: Path) -> ResultFile:
    """A parquet file or a journal.

    Raises:
        LabError: it is neither.
    """
    if path.name.endswith(JOURNAL_SUFFIX):
        content = read_journal(path)
        return ResultFile(path, known_damage(content, path), to_frame(content.rows))
    return read_result(path)


def render_report(
    rows: pd.DataFrame, manifest: RunManifest, validity: Validity, path: Path, slo: Slo = NO_LIMITS
) -> str:
    """The whole text for one arm; all repeats together, throughput as their median and extremes."""
    done = rows[rows["error"].isna()]
    return "\n".join(
        [
            _heading(manifest),
            "",
            _latency_table(done),
            "In brackets the interval by ranks, each end at 95%; n<300: too few requests for that.",
            "",
            *_run_figures(rows, manifest, slo),
            "",
            *validity.lines(),
            f"rows: {path}",
        ]
    )


def _heading(manifest: RunManifest) -> str:
    plan, service = manifest.schedule, manifest.service
    if service:
        settings = ", ".join(f"{name}={value}" for name, value in service.strategy.items())
        what = f"{manifest.arm} ({settings}) - {manifest.model}, {manifest.engine_text}"
    else:
        what = f"{manifest.arm} - {manifest.model} at {manifest.settings.url}"
    if plan.rate is None:
        shape = "".join(f", {name} {value}" for name, value in plan.shape.items())
        load = f"closed loop, {plan.concurrency} users{shape}"
    else:
        load = f"open loop, {plan.rate:g} requests/s, {plan.arrivals}"
    repeats = len(manifest.planned_repeats)
    times = f" x {repeats} repeats" if repeats > 1 else ""
    machine = f"{manifest.host.cpu_model}, {manifest.host.physical_cores} cores"
    seed = manifest.settings.seed
    held, sent = manifest.corpus.num_prompts, plan.num_requests
    cycled = f" ({held} prompts, over again)" if sent > held else ""
    return f"{printable(what)}\n{sent} requests{cycled}{times}, {load}, seed {seed} - {printable(machine)}"


def _latency_table(done: pd.DataFrame) -> str:
    lines: list[list[str]] = []
    for metric in METRICS:
        if metric.samples is None:
            continue
        samples = metric.samples(done)
        name = metric.title or metric.label if samples.is_per_token else "inter-chunk latency"
        cells = [samples.percentile(q).text(metric.digits) for q in MIN_SAMPLES]
        lines.append([f"{name} ({metric.unit})", *cells, number(samples.mean(), metric.digits)])
    return render_table([f"{len(done)} answers", *(f"p{q}" for q in MIN_SAMPLES), "mean"], lines)


def _run_figures(rows: pd.DataFrame, manifest: RunManifest, slo: Slo) -> list[str]:
    is_open = manifest.schedule.load.is_open
    parts = [part for _, part in rows.groupby("repeat")]
    lines: list[str] = []
    for metric in METRICS:
        if metric.of_run is not None:
            values = [v for part in parts if (v := metric.of_run(part, is_open)) is not None]
            unit = " ms" if metric.unit == "ms" and values else ""
            lines.append(f"{metric.label:<16} {spread(values, metric.digits)}{unit}")
    rates = [(part, rate) for part in parts if (rate := throughput(part, is_open=is_open)) is not None]
    lines += [
        f"measured over    {spread([rate.window_s for _, rate in rates])} s ({_window_name(is_open)})",
        f"mean batch size  {mean_batch_size(rows, manifest)}",
        f"dead-row share   {dead_row_share(manifest)}",
        *(f"{label:<16} {told}" for label, told in server_lines(manifest)),
    ]
    lines += _steady_lines(rows, manifest)
    if not manifest.settings.ignore_eos:
        lines.append(f"answer lengths   {lengths_in_words(rows)}")
    floor = manifest.floor
    if floor and floor.ttft_p50_ms is not None:
        told = f"TTFT p50 {floor.ttft_p50_ms:.2f} ms, send lag p99 {floor.send_lag_p99_ms:.2f} ms"
        lines.append(f"harness floor    {told}, of a server that answers at once")
    if slo.on_each_request and rates:
        good = [goodput(part, slo, rate.window_s) for part, rate in rates]
        met = spread([100 * item.share for item in good])
        lines.append(
            f"goodput          {spread([g.requests_per_s for g in good], 2)} requests/s ({met} % met all)"
        )
    for limit in slo.on_the_run:
        value = limit.figure.over(rows, is_open)
        state = "met" if limit.is_met_by(value) else "missed"
        lines.append(f"limit            {limit.text()}: {state} ({limit.figure.text(value)})")
    return lines


def _steady_lines(rows: pd.DataFrame, manifest: RunManifest) -> list[str]:
    found = steady_figures(rows, manifest.schedule.load)
    if found is None:
        return ["steady window    none: load was never as asked"]
    told = [
        f"{figure.label} {figure.text(value)}"
        for figure, value in zip(STEADY_FIGURES, found.latencies, strict=True)
    ]
    return [
        f"steady window    {share(found.share)} of the time, {found.num_requests} answers: "
        f"{found.output_tokens_per_s:,.1f} tok/s; in ms: {', '.join(told)}"
    ]


def _window_name(is_open: bool) -> str:
    return "start of the schedule to its last arrival" if is_open else "first send to last finish"


def mean_batch_size(rows: pd.DataFrame, manifest: RunManifest) -> str:
    """Live rows a step; from the answers' own account where a server has no step log."""
    logged = [size for entry in manifest.repeats if (size := entry.mean_batch_size) is not None]
    if logged:
        return spread(logged, 2)
    told = mean_of(rows["mean_batch_size"].to_numpy(dtype=float))
    return MISSING if told is None else f"{told:.2f} (as the answers tell)"


def dead_row_share(manifest: RunManifest) -> str:
    return share(mean_of([entry.steps.dead_row_share for entry in manifest.repeats if entry.steps]))
