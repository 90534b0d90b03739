"""`lab yardsticks --engines`: several engines on the same weights, threads and prompts, in turns.

Each engine is a process of its own, started by the Python that has its packages. All are loaded before the
first turn, and one works at a time. The first one is what ratios refer to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from adapters.base import LabError
from adapters.registry import interpreter_of
from harness.comparing.intervals import log_interval, middle_and_error
from harness.comparing.verdict import CONFIDENCE
from harness.results.output_dir import utc_stamp
from tools.engine_worker import CONTEXT
from tools.result_file import write_rows

_MAX_MODEL_LEN = 1024


class Worker:
    """An engine that is loaded, and waits for its turn."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process
        self.info = self._answer()

    def measure(self) -> list[dict[str, Any]]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(file=self._process.stdin, flush=True)
        measured: list[dict[str, Any]] = self._answer()["measured"]
        return measured

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended; its words are above"}
        if "error" in answer:
            raise LabError(f"{self.name}: {answer['error']}")
        return answer


@contextmanager
def _working(name: str, options: dict[str, Any]) -> Iterator[Worker]:
    """Raises: LabError, ConfigError: the engine cannot be loaded."""
    command = [interpreter_of(name), "-m", "tools.engine_worker", name, json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Worker(name, process)
        finally:
            process.kill()


def run(args: argparse.Namespace) -> int:
    """Measure, print, write `OUT/yardsticks/<UTC time>.parquet`."""
    options = {
        "model": args.model,
        "n_threads": args.threads,
        "max_model_len": _MAX_MODEL_LEN,
        "rows": args.rows,
        "requests": args.requests,
    }
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for entry in args.engines:
            say(f"loading {entry}")
            name, dtype = name_and_dtype(entry, args)
            workers[entry] = stack.enter_context(_working(name, {**options, "dtype": dtype}))
        infos = {name: worker.info for name, worker in workers.items()}
        for worker in workers.values():
            worker.measure()  # memory of a slot is mapped when it is first written
        measures = {name: lambda _, worker=worker: worker.measure() for name, worker in workers.items()}
        frame, path = take_turns(measures, args, {"engines": infos})
    info = next(iter(infos.values()))
    title = f"{info['model']}, {info['num_threads']} thread(s), context {CONTEXT}"
    headings = {entry: _heading(told) for entry, told in infos.items()}
    print_ratios(frame, title, headings)
    say(f"rows: {path}")
    return 0


def _heading(info: dict[str, Any]) -> str:
    """Some engines compute in another format than they read."""
    weights = info["details"].get("weights", info["dtype"])
    of_weights = "" if weights == info["dtype"] else f" of {weights} weights"
    return f"{info['backend']}, {info['dtype']}{of_weights}"


def name_and_dtype(entry: str, args: argparse.Namespace) -> tuple[str, str]:
    """`BACKEND` or `BACKEND:FORMAT`; every engine has fp32, so that is the default here."""
    name, _, dtype = entry.partition(":")
    return name, dtype or ("fp32" if args.dtype == "auto" else args.dtype)


def take_turns(
    measures: Mapping[str, Callable[[int], list[dict[str, Any]]]],
    args: argparse.Namespace,
    facts: dict[str, Any],
) -> tuple[pd.DataFrame, Path]:
    """Call each of `measures` with the number of each block, another one first in each block."""
    rows: list[dict[str, Any]] = []
    path = args.out / "yardsticks" / f"{utc_stamp()}.parquet"
    names = list(measures)
    for block in range(args.blocks):
        first = block % len(names)
        for name in names[first:] + names[:first]:
            say(f"block {block + 1}/{args.blocks}: {name}")
            rows += [{"block": block, "engine": name, **row} for row in measures[name](block)]
        write_rows(pd.DataFrame(rows), path, facts)  # what is measured outlives a kill
    return pd.DataFrame(rows), path


def print_ratios(frame: pd.DataFrame, title: str, headings: dict[str, str]) -> None:
    """Tokens/s, and the first engine's as a multiple of each other's with an interval over blocks."""
    first = next(iter(headings))
    table = Table(title=f"{title}: tokens/s ({first} / it)")
    for heading in ("", *headings.values()):
        table.add_column(heading, justify="right" if heading else "left")
    frame = frame.assign(rate=frame["num_tokens"] / frame["seconds"])
    for measure, of_it in frame.groupby("measure", sort=False):
        rates = of_it.pivot(index="block", columns="engine", values="rate")
        cells = []
        for name in headings:
            cell = f"{rates[name].median():,.0f}"
            if name != first and len(rates) > 1:
                logs = np.log((rates[first] / rates[name]).to_numpy())
                low, high = np.exp(log_interval(logs, CONFIDENCE))
                cell += f" ({np.exp(middle_and_error(logs)[0]):.2f}x, {low:.2f}-{high:.2f})"
            cells.append(cell)
        table.add_row(str(measure), *cells)
    Console(width=max(120, 30 * len(headings))).print(table)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
