"""`lab report`: prints what result files say, and writes one HTML page that opens offline.

What enters are files of this harness (parquet, or a journal that a killed run left behind); what leaves is
text, a page, Markdown or PNG charts. `--recover` turns a journal into the parquet it would have become.
Derives nothing that `metrics` does not define.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from adapters.base import LabError
from harness.commands.share import parse_share
from harness.comparing.comparison import render_comparison
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.page.files import load_report, to_markdown, write_charts, write_html
from harness.results.cost import read_price
from harness.results.manifest import ComparisonManifest, Manifest, RunManifest, Validity
from harness.results.metrics import Slo, goodput, throughput, token_gaps
from harness.results.record import (
    JOURNAL_SUFFIX,
    read_journal,
    read_parquet,
    to_frame,
    write_parquet,
)
from harness.results.stats import mean_of, percentile
from harness.results.table import MISSING, number, render_table, share, spread
from harness.results.validity import judge

LATENCIES = (
    ("ttft_ms", "TTFT, from send"),
    ("ttft_sched_ms", "TTFT, from schedule"),
    ("tpot_ms", "TPOT"),
    ("total_ms", "total, from send"),
    ("total_sched_ms", "total, from schedule"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="parquet files, or journals")
    parser.add_argument(
        "--recover", action="store_true", help=f"turn *{JOURNAL_SUFFIX} of killed runs into parquet first"
    )
    parser.add_argument("--slo", type=Slo.parse, metavar="LIMITS", help="goodput, as ttft_ms=500,tpot_ms=50")
    parser.add_argument(
        "--html", type=Path, metavar="PATH", help="where the page goes (default: beside FILE)"
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown for a pull request, no page")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write every chart as PNG as well")
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
    readable: list[Path] = []
    for path in args.files:
        try:
            shown = recover(path) if args.recover else path
            manifest, rows = read_rows(shown)
        except (LabError, OSError) as error:
            print(f"lab report: {error}", file=sys.stderr)
            status = 2
            continue
        if not shown.name.endswith(JOURNAL_SUFFIX):
            readable.append(shown)
        if not args.markdown:
            print(_text_of(shown, manifest, rows, args), end="\n\n")
        validity = manifest.validity
        if isinstance(manifest, RunManifest) and validity is None:
            validity = judge(rows, manifest)
        if validity is not None and validity.invalid:
            status = max(status, 1)
    if readable:
        _write_report(readable, args)
    return status


def _text_of(path: Path, manifest: Manifest, rows: pd.DataFrame, args: argparse.Namespace) -> str:
    if isinstance(manifest, ComparisonManifest):
        return render_comparison(rows, manifest, args.margin)
    return render_report(rows, manifest, judge(rows, manifest), path, args.slo)


def _write_report(paths: list[Path], args: argparse.Namespace) -> None:
    price = read_price(args.price_per_hour_usd, args.price_per_token_usd)
    data = load_report(paths, slo=args.slo, price=price, reference=args.baseline, margin=args.margin)
    if not any(len(arm.ttft_ms) for arm in data.arms):
        return
    if args.markdown:
        print(to_markdown(data))
    else:
        page = args.html or paths[0].with_suffix(".html")
        write_html(data, page)
        print(f"report: {page}")
    if args.png:
        charts = write_charts(data, args.png)
        print(f"{len(charts)} charts: {args.png}", file=sys.stderr)


def read_rows(path: Path) -> tuple[Manifest, pd.DataFrame]:
    """Manifest and rows of a parquet file or of a journal.

    Raises:
        LabError: it is neither.
    """
    if path.name.endswith(JOURNAL_SUFFIX):
        manifest, table = read_journal(path)
        return manifest, to_frame(table)
    return read_parquet(path)


def recover(journal: Path) -> Path:
    """Write the parquet file that a killed run did not get to write; the journal stays.

    Raises:
        LabError: it is not a journal, or the parquet file is there already.
    """
    if not journal.name.endswith(JOURNAL_SUFFIX):
        raise LabError(f"{journal} is not a journal: its name should end in {JOURNAL_SUFFIX}")
    path = journal.with_name(journal.name.removesuffix(JOURNAL_SUFFIX) + ".parquet")
    if path.exists():
        raise LabError(f"{path} is already there; remove it first if the journal should be used instead")
    manifest, table = read_journal(journal)
    manifest.validity = judge(to_frame(table), manifest)
    write_parquet(path, table, manifest)
    return path


def render_report(
    rows: pd.DataFrame, manifest: RunManifest, verdict: Validity, path: Path, slo: Slo | None = None
) -> str:
    """The whole text for one arm; all repeats together, throughput as their median and extremes."""
    done = rows[rows["error"].isna()]
    return "\n".join(
        [
            _headline(manifest),
            "",
            _latency_table(done),
            "",
            *_rates(rows, manifest, slo),
            "",
            *verdict.lines(),
            f"rows: {path}",
        ]
    )


def _headline(manifest: RunManifest) -> str:
    plan, service = manifest.schedule, manifest.service
    if service:
        settings = ", ".join(f"{name}={value}" for name, value in service.strategy.items())
        what = f"{manifest.arm} ({settings}) - {manifest.model}, {manifest.engine_text}"
    else:
        what = f"{manifest.arm} - {manifest.model} at {manifest.settings.url}"
    if plan.rate is None:
        load = f"closed loop, {plan.concurrency} users"
    else:
        load = f"open loop, {plan.rate:g} requests/s, {plan.arrivals}"
    repeats = len(manifest.planned_repeats)
    times = f" x {repeats} repeats" if repeats > 1 else ""
    machine = f"{manifest.host.cpu_model}, {manifest.host.physical_cores} cores"
    seed = manifest.settings.seed
    return f"{what}\n{plan.num_requests} requests{times}, {load}, seed {seed} - {machine}"


def _latency_table(done: pd.DataFrame) -> str:
    lines: list[list[str]] = []
    for column, name in LATENCIES:
        values = done[column].to_numpy(dtype=float)
        lines.append(
            [f"{name} (ms)", *(percentile(values, q).text() for q in (50, 95, 99)), number(mean_of(values))]
        )
    gaps = token_gaps(done)
    kind = "ITL" if gaps.is_per_token else "inter-chunk latency"
    cells = [percentile(gaps.gap_ms, q, weights=gaps.weights).text() for q in (50, 95, 99)]
    mean = (gaps.gap_ms * gaps.weights).sum() / gaps.weights.sum() if len(gaps.gap_ms) else None
    lines.append([f"{kind} (ms)", *cells, number(mean)])
    return render_table([f"{len(done)} answers", "p50", "p95", "p99", "mean"], lines)


def _rates(rows: pd.DataFrame, manifest: RunManifest, slo: Slo | None) -> list[str]:
    is_open = manifest.schedule.load.is_open
    parts = [part for _, part in rows.groupby("repeat")]
    rates = [rate for part in parts if (rate := throughput(part, is_open=is_open)) is not None]
    windows = [rate.window_s for rate in rates]
    lines = [
        f"output tok/s     {spread([rate.output_tokens_per_s for rate in rates])}",
        f"requests/s       {spread([rate.requests_per_s for rate in rates], 2)}",
        f"measured over    {spread(windows)} s ({_window_name(is_open)})",
        f"mean batch size  {mean_batch_size(rows, manifest)}",
        f"dead-row share   {dead_row_share(manifest)}",
    ]
    floor = manifest.floor
    if floor and floor.ttft_p50_ms is not None:
        told = f"TTFT p50 {floor.ttft_p50_ms:.2f} ms, send lag p99 {floor.send_lag_p99_ms:.2f} ms"
        lines.append(f"harness floor    {told}, of a server that answers at once")
    if slo is not None and rates:
        good = [goodput(part, slo, rate.window_s) for part, rate in zip(parts, rates, strict=False)]
        met = spread([100 * item.share for item in good])
        lines.append(
            f"goodput          {spread([g.requests_per_s for g in good], 2)} requests/s ({met} % met all)"
        )
    return lines


def _window_name(is_open: bool) -> str:
    return "start of the schedule to its last arrival" if is_open else "first send to last finish"


def mean_batch_size(rows: pd.DataFrame, manifest: RunManifest) -> str:
    """Live rows a step; from the answers' own account where a server has no step log."""
    logged = [entry.steps.mean_batch_size for entry in manifest.repeats if entry.steps]
    if logged:
        return spread(logged, 2)
    told = mean_of(rows["mean_batch_size"].to_numpy(dtype=float))
    return MISSING if told is None else f"{told:.2f} (as the answers tell)"


def dead_row_share(manifest: RunManifest) -> str:
    shares = [entry.steps.dead_row_share for entry in manifest.repeats if entry.steps]
    return share(sum(shares) / len(shares)) if shares else MISSING
