"""`lab profile`: where the time of a decode step goes, by part and number of rows.

The real engine loop runs, and its reports pass through a pipe as in the service. A part's time is its own,
without that of the parts it calls. Prints a table, also fit for Markdown, and writes a row for each part and
step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pandas as pd

from adapters.torch_backend.backend import TorchBackend
from adapters.torch_backend.cpu.kernels import CpuKernels
from adapters.torch_backend.step_parts import STEP_PARTS
from harness.results.output_dir import utc_stamp, whole_file
from harness.results.table import render_table
from services.engine.engine import Engine
from services.engine.messages import StepReport
from services.engine.scheduler import Scheduler
from services.engine_client.wire import pack
from tools.engine_drive import Work, add_common_arguments, cpu_config, drive

_STEP = "engine loop"
_PARTS: list[tuple[object, str, str]] = [
    *STEP_PARTS,
    *((Scheduler, name, "scheduler") for name in ("schedule", "mark_launched", "update_from_output")),
    (Engine, "step", _STEP),
]
OUTSIDE_THE_FORWARD = ("packing rows", "sampling", "scheduler", "messages", _STEP)


class SelfTimes:
    """Own time in s of each part since `take`; a call's time is not that of its caller."""

    def __init__(self) -> None:
        self._times: defaultdict[str, float] = defaultdict(float)
        self._inner_s = [0.0]

    def wrap(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self._inner_s.append(0.0)
            started_s = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                took_s = time.perf_counter() - started_s
                self._times[part] += took_s - self._inner_s.pop()
                self._inner_s[-1] += took_s

        return timed

    def wrap_model(self, run_model: Callable[..., Any]) -> Callable[..., Any]:
        """`CpuKernels.run_model`, which takes the time of its parts itself."""

        def timed(kernels: CpuKernels, *args: Any) -> Any:
            kernels.take_part_seconds()
            returned = run_model(kernels, *args)
            for part, took_s in kernels.take_part_seconds().items():
                self._times[part] += took_s
                self._inner_s[-1] += took_s
            return returned

        return timed

    def take(self) -> dict[str, float]:
        taken = dict(self._times)
        self._times.clear()
        return taken


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument(
        "--context", type=int, default=128, help="tokens that each row has behind it, on average"
    )
    parser.add_argument("--steps", type=int, default=64, help="steps to measure (default 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of all rows (default 0: the likeliest token)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="of all rows (default 1: no limit)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write `OUT/profile/<UTC time>.parquet`."""
    config = cpu_config(args, max(args.rows))
    times = SelfTimes()
    backend = TorchBackend(config)
    for owner, name, part in _PARTS:
        setattr(owner, name, times.wrap(getattr(owner, name), part))
    setattr(CpuKernels, "run_model", times.wrap_model(CpuKernels.run_model))  # noqa: B010 - mypy forbids an assignment
    frames = []
    for num_rows in args.rows:
        print(f"{num_rows} rows ...", file=sys.stderr, flush=True)
        frames.append(_profile(backend, times, num_rows, args).assign(num_rows=num_rows))
    frame = pd.concat(frames, ignore_index=True)
    path = args.out / "profile" / f"{utc_stamp()}.parquet"
    with whole_file(path) as file:
        frame.to_parquet(file)
    info = backend.info
    print(
        f"{info.model}, {info.dtype}, {info.num_threads} engine thread(s), context {args.context}; ms a step"
    )
    print(_table(frame))
    print(f"rows: {path}")
    return 0


def _profile(
    backend: TorchBackend, times: SelfTimes, num_rows: int, args: argparse.Namespace
) -> pd.DataFrame:
    """One row a step and part, for the steps in which all rows decode."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_swallow, args=(reader,), daemon=True)
    process.start()
    rows: list[dict[str, Any]] = []

    def send(report: StepReport) -> None:
        writer.send_bytes(pack(report))

    timed_send = times.wrap(send, "messages")

    def publish(report: StepReport) -> None:
        timed_send(report)
        record = report.record
        # The engine publishes within its step, so what is taken here lasts from one publish to the next.
        took = times.take()
        if record and record.num_decode_tokens == num_rows:
            rows.extend({"step": record.step, "part": part, "seconds": s} for part, s in took.items())

    begin = max(args.context - args.steps // 2, 1)
    how = {"temperature": args.temperature, "top_p": args.top_p}
    work = [
        Work([(7 * row + 13 * j) % 251 for j in range(begin)], args.steps + 2, **how)
        for row in range(num_rows)
    ]
    drive(backend, "continuous", work, max_batch=num_rows, max_step_tokens=1024, publish=publish)
    process.terminate()
    process.join()
    return pd.DataFrame(rows)


def _swallow(reader: Connection) -> None:
    """The other end of the pipe, in a process of its own as in the service."""
    while True:
        reader.recv_bytes()


def _table(frame: pd.DataFrame) -> str:
    """Medians over steps in ms; `outside the forward` is what is not torch's or the kernels' work."""
    ms = frame.assign(ms=lambda f: f["seconds"] * 1e3)
    steps = ms.pivot_table(index=["num_rows", "step"], columns="part", values="ms", aggfunc="sum").fillna(0.0)
    parts = steps.groupby("num_rows").median()
    order = list(parts.mean().sort_values(ascending=False).index)
    whole = steps.sum(axis=1).groupby("num_rows").median()
    outside = steps[[p for p in OUTSIDE_THE_FORWARD if p in steps]].sum(axis=1).groupby("num_rows").median()
    lines = [[part, *(f"{parts.loc[n, part]:.2f}" for n in parts.index)] for part in order]
    lines.append(["whole step", *(f"{whole[n]:.2f}" for n in parts.index)])
    lines.append(
        [
            "step / matrix products",
            *(f"{whole[n] / parts.loc[n, 'matrix products']:.2f}x" for n in parts.index),
        ]
    )
    lines.append(["outside the forward", *(f"{outside[n] / whole[n]:.1%}" for n in parts.index)])
    return render_table(["part", *(f"{n} rows" for n in parts.index)], lines)
