"""`lab results`: a page over all results of a folder, on this machine alone, until it is interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn

from adapters.base import ConfigError
from harness.results_page.app import make_app
from harness.results_page.live import LiveSteps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="default results")
    parser.add_argument("--port", type=int, default=8790, help="on 127.0.0.1 (default 8790)")
    parser.add_argument("--watch", metavar="URL", help="show a running service of this machine as well")


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        ConfigError: there is no such folder, or the service to watch is elsewhere.
    """
    if not args.folder.is_dir():
        raise ConfigError(f"{args.folder} is no folder: measure something first, or name the folder")
    live = LiveSteps(args.watch) if args.watch else None
    print(f"results: http://127.0.0.1:{args.port}/ (Ctrl-C ends it)", flush=True)
    uvicorn.run(make_app(args.folder, live), host="127.0.0.1", port=args.port, log_level="warning")
    return 0
