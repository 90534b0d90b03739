"""What a container costs: one service in the image `cpu`, one beside it, asked in turns by one harness.

    BACKEND=torch MODEL=lab-26m N_THREADS=1 python -m tools.container_turns --blocks 20 --out turns.parquet

Each block starts both services anew, lets both answer one request a user, so that their memory is mapped,
and gives them the same new draw of requests in the order A B B A, every other block B A A B, so that a
machine that gets slower meets both alike. The number of blocks is fixed before the first one: a call goes
on where the file ends, and no block is left out or added for what it says. The container has what
docker/compose.yml gives it and the image's health checks, and is asked at its own address, as the front
asks it. The checks, some milliseconds of CPU every 5 s, run during the turns of both. `python` should be
the one that the image has.

Two figures: output tokens by the clock, and by CPU seconds of the whole machine, in which Docker's part (the
bridge) is but waiting for a hypervisor is not. Ratios are means over a block's turns, with 95%
intervals over blocks. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import psutil

from adapters.base import LabError
from harness.client.control import Control
from harness.comparing.intervals import FEWEST_BLOCKS, log_interval, middle_and_error
from harness.comparing.verdict import CONFIDENCE
from harness.measure import measure
from harness.plan.planner import plan
from harness.plan.schedule import Schedule
from harness.replay.arm_file import Arm, Measurement
from harness.replay.progress import Reporter, make_reporter
from harness.replay.service_process import ServiceLaunch, running_service
from harness.results.formulas import throughput
from harness.results.table import render_table
from harness.settings import HarnessSettings, read_settings
from services.contract.status import ModelCard
from tools.result_file import write_rows

INSIDE, OUTSIDE = "container", "outside"
FIGURES = {"tokens_per_s": "tok/s", "tokens_per_cpu_s": "tok per CPU s of the machine"}
SETTINGS = ("BACKEND", "MODEL", "N_THREADS", "MAX_BATCH")
# As docker/compose.yml has them.
OPTIONS = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
    *("--tmpfs", "/tmp", "--shm-size", "256m", "--cpu-shares", "2048"),
)
ADDRESS = "{{.NetworkSettings.IPAddress}}"
START_TIMEOUT_S = 300.0


def docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"docker {words[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def container(image: str, env: Mapping[str, str]) -> Iterator[str]:
    """The URL of a container that is starting; models and kernels stay on the volume `lab-turns`.

    Raises:
        LabError: the engine refuses.
    """
    given = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
    options = [*OPTIONS, "--volume", "lab-turns:/lab/artifacts", *given]
    name = docker("run", "--detach", *options, image, "serve", "--variant", "continuous")
    try:
        yield f"http://{docker('inspect', '--format', ADDRESS, name)}:8000"
    finally:
        docker("rm", "--force", name)


def wait_until_ready(url: str) -> ModelCard:
    """
    Raises:
        LabError: it does not answer in time.
    """
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with Control(url) as control:
        while time.monotonic() < deadline_s:
            health = control.health()
            if health is not None and health.status == "ok" and (card := control.model_card()):
                return card
            time.sleep(0.1)
    raise LabError(f"the container at {url} is not ready after {START_TIMEOUT_S:g} s")


def measure_block(
    block: int, image: str, settings: HarnessSettings, reporter: Reporter
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a turn, and what both services say of themselves.

    Raises:
        LabError: a service does not start, or the two do not run the same kernels.
    """
    corpus, schedule = plan(settings, allow_changed_corpus=False, draw=block)
    first = settings.model_copy(update={"requests": settings.concurrency})
    _, first_schedule = plan(first, allow_changed_corpus=False, draw=block)
    env = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    launch = ServiceLaunch("continuous", env)
    with ExitStack() as stack:
        inside = stack.enter_context(container(image, env))
        outside = stack.enter_context(
            running_service(launch, start_timeout_s=START_TIMEOUT_S, announce=reporter.announce)
        )
        cards = {INSIDE: wait_until_ready(inside), OUTSIDE: wait_until_ready(outside.url)}
        urls = {INSIDE: inside, OUTSIDE: outside.url}
        kernels = [{k: v for k, v in c.details.items() if "kernel" in k} for c in cards.values()]
        if kernels[0] != kernels[1] or cards[INSIDE].model_digest != cards[OUTSIDE].model_digest:
            raise LabError(f"the services run different kernels or weights: {kernels[0]} and {kernels[1]}")

        def turn(where: str, schedule: Schedule) -> Measurement:
            with TemporaryDirectory() as folder:
                own = settings.model_copy(update={"url": urls[where], "out": Path(folder)})
                return measure(Arm("continuous", where), own, corpus, schedule, reporter, [0])

        rows: list[dict[str, Any]] = []
        truth: pd.Series | None = None
        order = (INSIDE, OUTSIDE) if block % 2 == 0 else (OUTSIDE, INSIDE)
        for where in order:
            turn(where, first_schedule)
        for place, where in enumerate([*order, *reversed(order)]):
            made = turn(where, schedule)
            entry, found = made.manifest.repeats[0], throughput(made.rows, is_open=False)
            if found is None or made.was_interrupted:
                raise LabError("a turn was cut short")
            answers = made.rows.set_index("prompt_id")["output_sha256"].sort_index()
            truth = answers if truth is None else truth
            num_tokens = int(made.rows["num_output_tokens"].sum())
            busy_s = (entry.machine.busy_share or 0.0) * (psutil.cpu_count() or 1) * entry.wall_s
            row = {"block": block, "place": place, "where": where, "num_requests": len(answers)}
            row |= {"num_tokens": num_tokens, "seconds": found.window_s, "machine_cpu_s": busy_s}
            row |= {"tokens_per_s": found.output_tokens_per_s, "tokens_per_cpu_s": num_tokens / busy_s}
            row |= {"steal_share": entry.machine.steal_share, "num_equal": int((answers == truth).sum())}
            rows.append(row)
    return rows, {where: card.model_dump(mode="json") for where, card in cards.items()}


def log_ratios(frame: pd.DataFrame, column: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Logarithm of container by outside, one a block."""
    logs = np.log(frame[column]).groupby([frame["block"], frame["where"]]).mean().unstack()
    return np.asarray(logs[INSIDE] - logs[OUTSIDE], dtype=float)


def turns_table(frame: pd.DataFrame) -> str:
    """Means over turns, and ratios with intervals where there are blocks enough."""
    lines = []
    for column, name in FIGURES.items():
        means = frame.groupby("where")[column].mean()
        logs = log_ratios(frame, column)
        ratio = f"{np.exp(middle_and_error(logs)[0] if len(logs) > 1 else logs[0]):.3f}"
        if len(logs) >= FEWEST_BLOCKS:
            low, high = np.exp(log_interval(logs, CONFIDENCE))
            ratio += f" [{low:.3f}-{high:.3f}]"
        lines.append([name, f"{means[INSIDE]:.0f}", f"{means[OUTSIDE]:.0f}", ratio])
    return render_table(["", INSIDE, OUTSIDE, "container by outside"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", default="batching-lab:cpu")
    parser.add_argument("--blocks", type=int, default=20, help="all of them together (default 20)")
    parser.add_argument("--requests", type=int, default=48, help="of a turn (default 48)")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no block that would end later")
    parser.add_argument("--out", type=Path, required=True, help="the rows, as parquet; blocks in it are kept")
    args = parser.parse_args()
    chosen = {"requests": args.requests, "concurrency": args.concurrency, "warmup": 4, "floor": False}
    settings = read_settings(argparse.Namespace(**chosen, salt="0"))
    frame = pd.read_parquet(args.out) if args.out.exists() else pd.DataFrame()
    began_s = time.monotonic()
    longest_s = 0.0
    with make_reporter() as reporter:
        for block in range(frame["block"].max() + 1 if len(frame) else 0, args.blocks):
            start_s = time.monotonic()
            if start_s + longest_s - began_s > args.limit_s:
                print(f"no time for block {block + 1} of {args.blocks}", file=sys.stderr)
                break
            rows, cards = measure_block(block, args.image, settings, reporter)
            frame = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
            asked = {"image": args.image, "blocks": args.blocks, "concurrency": args.concurrency}
            write_rows(frame, args.out, {"asked": asked, "cards": cards})
            longest_s = max(longest_s, time.monotonic() - start_s)
            print(f"block {block + 1}/{args.blocks}, {longest_s:.0f} s", file=sys.stderr, flush=True)
    if len(frame):
        num_blocks = frame["block"].nunique()
        equal = "all equal" if (frame["num_equal"] == frame["num_requests"]).all() else "NOT all equal"
        print(f"{num_blocks} of {args.blocks} blocks; answers {equal}\n\n{turns_table(frame)}")


if __name__ == "__main__":
    main()
