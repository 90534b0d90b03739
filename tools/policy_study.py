"""The tables of docs/policies.md: orders and step layouts on a virtual clock, over several seeds.

Each seed draws other arrivals, shared by all arms; ratios are paired by seed, with t intervals at 95%. What a
step costs is the null backend's formula, so the figures speak of scheduling alone. `--orders FILE` and
`--layouts FILE` make the same tables of a measured comparison, paired by block.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.comparing.intervals import t_quantile
from harness.results.manifest import ComparisonManifest
from harness.results.record import read_parquet
from harness.results.table import render_table

ORDERS = [
    "fcfs",
    "hrrn",
    "sjf",
    *(
        f"{order},LENGTH_ORACLE={spread}"
        for order, spread in (("hrrn", 1.0), ("sjf", 0.5), ("sjf", 1.0), ("sjf", 2.0))
    ),
]
LAYOUTS = ["decode_first", "prefill_first", "whole_prompts"]
Figures = Callable[[pd.DataFrame], list[float]]
Values = NDArray[np.float64]
STEP = {"NULL_STEP_MS": "10", "NULL_ROW_MS": "0.3"}


def order_figures(rows: pd.DataFrame) -> list[float]:
    """Mean, median and 99th percentile of TTFT, and the longest overtaking, all in seconds."""
    rows = rows.sort_values("scheduled_s")
    came = rows["scheduled_s"].to_numpy()
    first = np.array([stamps[0] for stamps in rows["chunk_s"]])
    overtaken_s = 0.0
    for index, at_s in enumerate(first):
        later = np.nonzero(first[index + 1 :] < at_s)[0]
        if len(later):
            overtaken_s = max(overtaken_s, came[index + 1 + later[-1]] - came[index])
    ttft = first - came
    return [ttft.mean(), *np.percentile(ttft, [50, 99]), overtaken_s]


def layout_figures(rows: pd.DataFrame) -> list[float]:
    """TTFT p50 and p95, the 99th percentile of gaps between tokens and TPOT p50, all in milliseconds."""
    ttft = np.array([stamps[0] for stamps in rows["chunk_s"]]) - rows["scheduled_s"].to_numpy()
    gaps = np.concatenate([np.diff(stamps) for stamps in rows["chunk_s"]])
    tpot = [(stamps[-1] - stamps[0]) / (len(stamps) - 1) for stamps in rows["chunk_s"] if len(stamps) > 1]
    return [1e3 * x for x in (*np.percentile(ttft, [50, 95]), np.percentile(gaps, 99), np.median(tpot))]


def simulated(
    arms: Sequence[str],
    options: Sequence[str],
    seed: int,
    costs: dict[str, str],
    figures: Figures,
) -> list[list[float]]:
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tools.cli", "simulate", "--calibrate", "null", "--out", folder]
        command += ["--seed", str(seed), *options, "--variants", *arms]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | costs)
        found = {}
        for path in Path(folder).rglob("*.parquet"):
            if not path.name.endswith(".steps.parquet"):
                rows = pd.read_parquet(path)
                found[rows["arm"].iloc[0].replace(" ", "@", 1).replace(" ", ",")] = figures(rows)
    return [found[arm] for arm in arms]


def measured(path: Path, figures: Figures) -> tuple[list[str], Values]:
    """The arms of a comparison's rows, the reference first, and their figures in each block."""
    manifest, rows = read_parquet(path)
    assert isinstance(manifest, ComparisonManifest)
    arms = sorted(manifest.arms, key=lambda arm: arm != manifest.reference)
    done = rows[rows["error"].isna()]
    blocks = [part for _, part in done.groupby("repeat")]
    return arms, np.array([[figures(part[part["arm"] == arm]) for arm in arms] for part in blocks])


def table(title: str, names: Sequence[str], arms: Sequence[str], values: Values) -> str:
    """`values` (blocks, arms, figures), with ratios to the first arm where it never has 0."""
    lines = []
    for index, arm in enumerate(arms):
        cells = [arm.partition("=")[2] or title.split()[-1]]
        for place in range(values.shape[2]):
            own, first = values[:, index, place], values[:, 0, place]
            ratio = ""
            if index and min(own.min(), first.min()) > 0:
                logs = np.log(own / first)
                half = t_quantile(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
                low, high = np.exp(logs.mean() - half), np.exp(logs.mean() + half)
                ratio = f" ({np.exp(logs.mean()):.2f}x [{low:.2f}-{high:.2f}])"
            cells.append(f"{own.mean():.2f}{ratio}" if own.mean() < 100 else f"{own.mean():.0f}{ratio}")
        lines.append(cells)
    return render_table([title.split()[0], *names], lines)


ORDER_NAMES = ["mean TTFT (s)", "TTFT p50 (s)", "TTFT p99 (s)", "longest overtaking (s)"]
LAYOUT_NAMES = ["TTFT p50 (ms)", "TTFT p95 (ms)", "gap p99 (ms)", "TPOT p50 (ms)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--orders", type=Path, metavar="FILE", help="of a measured comparison instead")
    parser.add_argument("--layouts", type=Path, metavar="FILE", help="of a measured comparison instead")
    args = parser.parse_args()
    if args.orders:
        print(table("order fcfs", ORDER_NAMES, *measured(args.orders, order_figures)))
    if args.layouts:
        print(table("layout decode_first", LAYOUT_NAMES, *measured(args.layouts, layout_figures)))
    if args.orders or args.layouts:
        return
    orders = ["continuous", *(f"continuous@ORDER={order}" for order in ORDERS[1:])]
    for rate in ("10.2", "11.2"):
        options = ["--requests", "1500", "--rate", rate]
        costs = STEP | {"NULL_PROMPT_TOKEN_MS": "0.05"}
        values = np.array([simulated(orders, options, s, costs, order_figures) for s in range(args.seeds)])
        print(f"\norders at {rate} requests/s\n")
        print(table("order fcfs", ORDER_NAMES, orders, values))
    layouts = ["continuous", *(f"continuous@STEP_LAYOUT={layout}" for layout in LAYOUTS[1:])]
    for rate in ("1.5", "2.2", "2.9"):
        options = ["--requests", "600", "--corpus", "synthetic:400x80", "--rate", rate]
        costs = STEP | {"NULL_PROMPT_TOKEN_MS": "0.5"}
        values = np.array([simulated(layouts, options, s, costs, layout_figures) for s in range(args.seeds)])
        print(f"\nlayouts at {rate} requests/s\n")
        print(table("layout decode_first", LAYOUT_NAMES, layouts, values))


if __name__ == "__main__":
    main()
