"""`lab history`: results of many commits in one folder, the trend as a page, and as series for Prometheus."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adapters.base import LabError
from harness.commands.options import parse_share, without_steps
from harness.history import exposition, store
from harness.history.page import write_page, write_pictures
from harness.history.series import marks
from harness.history.trials import trials_text
from harness.results.metrics import FIGURES
from harness.results.output_dir import whole_file

DEFAULT_FOLDER = Path("history")
DAMAGED_STATUS = 3
"""What is whole was used. 2 says that nothing was done."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, words: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=words, description=words)
        if name != "trials":
            made.add_argument(
                "--to" if name == "add" else "--folder",
                dest="folder",
                type=Path,
                default=DEFAULT_FOLDER,
                metavar="FOLDER",
                help=f"of the history (default {DEFAULT_FOLDER})",
            )
        return made

    add = action("add", "add result files; those that are there already change nothing")
    add.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="parquet files of results")
    page = action("page", "write the trend as one HTML page that opens offline")
    page.add_argument("--html", type=Path, metavar="PATH", help="default: index.html in the folder")
    page.add_argument("--png", type=Path, metavar="FOLDER", help="write every chart as PNG as well")
    prune = action("prune", "remove what is older than some days")
    prune.add_argument("--keep-days", type=int, default=400, metavar="N", help="default 400")
    series = action("openmetrics", "write OpenMetrics for `promtool tsdb create-blocks-from openmetrics`")
    series.add_argument("--file", type=Path, metavar="PATH", help="default: standard output")
    query = action("query", "run SQL over the table `history` with DuckDB")
    query.add_argument("sql", metavar="SQL", help='as "SELECT * FROM history LIMIT 3"')
    trials = action("trials", "print how often change points are right on made-up histories")
    trials.add_argument("--histories", type=int, default=200, metavar="N", help="default 200")
    trials.add_argument("--nights", type=int, default=60, metavar="N", help="default 60")
    trials.add_argument("--step", type=parse_share, default=0.05, metavar="SHARE", help="default 5%%")


def run(args: argparse.Namespace) -> int:
    """0, or `DAMAGED_STATUS`.

    Raises:
        LabError: there is no history, or it cannot be written.
    """
    if args.action == "trials":
        print(trials_text(args.histories, args.nights, args.step))
        return 0
    if args.action == "add":
        return _add(args)
    if args.action == "prune":
        num = store.prune(args.folder, keep_days=args.keep_days)
        print(f"{num} files removed")
        return 0
    is_query = args.action == "query"
    history = store.query(args.folder, args.sql) if is_query else store.read(args.folder)
    _tell_damaged(history.damaged)
    if is_query:
        print(history.rows.to_string())
    elif args.action == "page":
        page = args.html or args.folder / "index.html"
        parts = write_page(history, page)
        for mark in marks(history.rows):
            what = f"{FIGURES[mark.metric].label} of {mark.strategy} ({', '.join(mark.group)})"
            source = " (ratios of commits measured in turns)" if mark.of_ratios else ""
            print(f"{mark.at:%Y-%m-%d} {mark.commit}: {what} {mark.ratio - 1:+.1%}{source}")
        print(f"page: {page}")
        if args.png:
            print(f"{len(write_pictures(parts, args.png))} pictures: {args.png}")
    else:
        text = exposition.to_openmetrics(history.rows)
        if args.file is None:
            print(text, end="")
        else:
            with whole_file(args.file) as file:
                file.write(text.encode())
            print(f"series: {args.file}")
    return DAMAGED_STATUS if history.damaged else 0


def _add(args: argparse.Namespace) -> int:
    added = store.add(args.folder, without_steps(args.results))
    told = f"{len(added.new)} added, {len(added.known)} there already"
    print(f"{told}, {len(added.damaged)} damaged: {args.folder}")
    _tell_damaged(added.damaged)
    if not added.new and not added.known:
        raise LabError("none of these files is a result")
    return DAMAGED_STATUS if added.damaged else 0


def _tell_damaged(sentences: list[str] | tuple[str, ...]) -> None:
    for sentence in sentences:
        print(f"damaged: {sentence}", file=sys.stderr)
