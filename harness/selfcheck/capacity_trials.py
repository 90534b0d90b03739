"""How well `lab capacity` finds a capacity that is known.

`python -m harness.selfcheck.capacity_trials --write docs/measurement.md` makes the table. The simulated
servers run on a virtual clock: one worker, random arrivals (M/M/1), and the limit is on the p95 of the time
in the system, so that the rate is service rate - ln(20) / limit. `--sockets` adds a real server that works on
one request at a time. It is found by the search that the command makes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from harness.comparing.capacity import Capacities, Estimate, find_capacities
from harness.plan.schedule import Arrivals, derive_seed
from harness.replay.arm_file import Arm
from harness.replay.floor import measure_known
from harness.replay.known_server import Delays
from harness.results.table import number, render_table, replace_section, share

SERVES = {"slow": 10.0, "fast": 14.0}
"""Requests a second that each simulated server works off."""
LIMIT_S = 0.5
CLOSEST = 0.03
NUM_REQUESTS = 10_000
BUSY_S = 0.020


def true_capacity(serves_per_s: float) -> float:
    """M/M/1: the time in the system is exponential, of rate `serves_per_s` less the arrivals'."""
    return serves_per_s - math.log(20) / LIMIT_S


def simulated(seed: int, num_blocks: int, num_requests: int) -> Capacities:
    """One search of both servers: arrivals are shared by them within a block, work is not."""

    def holds_at(arm: Arm, block: int) -> Callable[[float], bool]:
        name = str(arm.name)
        gaps = np.random.default_rng(derive_seed(seed, f"arrivals/{block}")).exponential(size=num_requests)
        work_s = np.random.default_rng(derive_seed(seed, f"{name}/{block}")).exponential(size=num_requests)
        work_s /= SERVES[name]

        def holds(rate: float) -> bool:
            # Lindley (1952): the wait is how far the sum of work less gaps is above its lowest point so far.
            steps = np.concatenate(([0.0], np.cumsum(work_s[:-1] - gaps[1:] / rate)))
            waits = steps - np.minimum.accumulate(steps)
            return bool(np.percentile(waits + work_s, 95) <= LIMIT_S)

        return holds

    arms = [Arm(None, name) for name in SERVES]
    return Capacities(find_capacities(arms, num_blocks, 1.0, CLOSEST, seed, holds_at), "slow", "", CLOSEST)


def covering(
    num_trials: int, num_blocks: int, num_requests: int, seed: int
) -> list[tuple[str, float, float]]:
    """Of both capacities and their ratio: name, mean relative error, share of intervals that hold."""
    truth = {name: true_capacity(rate) for name, rate in SERVES.items()}
    truth["ratio"] = truth["fast"] / truth["slow"]
    errors: dict[str, list[float]] = {name: [] for name in truth}
    covers: dict[str, list[bool]] = {name: [] for name in truth}
    for trial in range(num_trials):
        found = simulated(derive_seed(seed, f"trial/{trial}"), num_blocks, num_requests)
        own: dict[str, Estimate | None] = {name: found.capacity(name) for name in SERVES}
        own["ratio"] = found.ratio("fast")
        for name, told in own.items():
            if told is None or told.interval is None:
                covers[name].append(False)
                continue
            errors[name].append(told.value / truth[name] - 1)
            covers[name].append(told.interval[0] <= truth[name] <= told.interval[1])
    return [(name, float(np.mean(errors[name])), float(np.mean(covers[name]))) for name in truth]


def on_sockets(num_blocks: int, num_requests: int = 200, seed: int = 1) -> Estimate | None:
    """Of a real server whose knee is 1 / `BUSY_S`, with even arrivals and three work times as the limit."""

    def holds_at(arm: Arm, block: int) -> Callable[[float], bool]:
        def holds(rate: float) -> bool:
            rows = measure_known(Delays(busy_s=BUSY_S), rate, num_requests, 2, Arrivals.CONSTANT).rows
            return bool(np.percentile(rows["ttft_sched_ms"].to_numpy(dtype=float), 95) <= 3e3 * BUSY_S)

        return holds

    made = find_capacities([Arm(None, "known")], num_blocks, 0.8 / BUSY_S, CLOSEST, seed, holds_at)
    return Capacities(made, "known", "", CLOSEST).capacity("known")


def main() -> None:
    parser = argparse.ArgumentParser(description="capacities that are known, searched as `lab capacity` does")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sockets", action="store_true", help="a real server as well")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this Markdown file")
    args = parser.parse_args()
    lines = []
    for num_blocks in (3, 5, 10):
        for name, error, covered in covering(args.trials, num_blocks, NUM_REQUESTS, args.seed):
            fast, slow = (true_capacity(SERVES[own]) for own in ("fast", "slow"))
            true = fast / slow if name == "ratio" else true_capacity(SERVES[name])
            lines.append([name, number(true, 2), str(num_blocks), f"{error:+.1%}", share(covered)])
    if args.sockets and (found := on_sockets(3)) is not None:
        true = 1 / BUSY_S
        lines.append(["real sockets", number(true, 2), "3", f"{found.value / true - 1:+.1%}", found.text()])
    headers = ["server", "true (requests/s)", "blocks", "mean error", "intervals that hold the truth"]
    table = render_table(headers, lines)
    print(table)
    if args.write:
        replace_section(args.write, "capacity-trials", table)


if __name__ == "__main__":
    main()
