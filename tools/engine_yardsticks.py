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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from adapters.base import LabError
from adapters.registry import interpreter_of
from harness.comparing.intervals import log_interval
from harness.results.output_dir import utc_stamp
from tools.engine_worker import CONTEXT
from tools.result_file import write_rows

_CONFIDENCE = 0.95
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
        "dtype": "fp32" if args.dtype == "auto" else args.dtype,
        "num_threads": args.threads,
        "max_model_len": _MAX_MODEL_LEN,
        "rows": args.rows,
        "requests": args.requests,
    }
    rows: list[dict[str, Any]] = []
    path = args.out / "yardsticks" / f"{utc_stamp()}.parquet"
    with contextlib.ExitStack() as stack:
        workers = []
        for name in args.engines:
            _say(f"loading {name}")
            workers.append(stack.enter_context(_working(name, options)))
        infos = {worker.name: worker.info for worker in workers}
        for worker in workers:
            worker.measure()  # memory of a slot is mapped when it is first written
        for block in range(args.blocks):
            for worker in workers[block % len(workers) :] + workers[: block % len(workers)]:
                _say(f"block {block + 1}/{args.blocks}: {worker.name}")
                rows += [{"block": block, "engine": worker.name, **row} for row in worker.measure()]
            write_rows(pd.DataFrame(rows), path, {"engines": infos})  # what is measured outlives a kill
    _print(pd.DataFrame(rows), infos)
    _say(f"rows: {path}")
    return 0


def _print(frame: pd.DataFrame, infos: dict[str, dict[str, Any]]) -> None:
    """Tokens/s, and the first engine's as a multiple of each other's with an interval over blocks."""
    first, info = next(iter(infos.items()))
    title = f"{info['model']}, {info['num_threads']} thread(s), context {CONTEXT}: tokens/s ({first} / it)"
    table = Table(title=title)
    table.add_column("")
    for name, told in infos.items():
        table.add_column(f"{name}, {told['dtype']}", justify="right")
    frame = frame.assign(rate=frame["num_tokens"] / frame["seconds"])
    for measure, of_it in frame.groupby("measure", sort=False):
        rates = of_it.pivot(index="block", columns="engine", values="rate")
        cells = []
        for name in infos:
            cell = f"{rates[name].median():,.0f}"
            if name != first and len(rates) > 1:
                logs = np.log((rates[first] / rates[name]).to_numpy())
                low, high = np.exp(log_interval(logs, _CONFIDENCE))
                cell += f" ({np.exp(logs.mean()):.2f}x, {low:.2f}-{high:.2f})"
            cells.append(cell)
        table.add_row(str(measure), *cells)
    Console(width=max(120, 30 * len(infos))).print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
