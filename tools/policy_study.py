"""The tables of docs/policies.md: orders and step layouts on a virtual clock, over several seeds.

Each seed draws other arrivals, shared by all arms; ratios are paired by seed, with t intervals at 95%. What a
step costs is the null backend's formula, so the figures speak of scheduling alone. `--orders FILE` and
`--layouts FILE` make the same tables of a measured comparison, paired by block. For `vtc`, `edf` and
preemption by priority the corpus gets classes, and clients of which one sends more than half of all requests.
"""

from __future__ import annotations

import argparse
import json
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
from harness.plan.corpus import default_path
from harness.plan.draws import Draws
from harness.results.manifest import ComparisonManifest
from harness.results.record import read_parquet
from harness.results.table import render_table
from services.engine.policies import Policies
from tools.make_prompts import write_corpus

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
CLASSES = {
    "as equals": "AGING_S=0",
    "fcfs": "",
    "edf": "ORDER=edf",
    "paged": "KV_POLICY=paged",
    "paged, PRIORITY_PREEMPTION": "KV_POLICY=paged,PRIORITY_PREEMPTION=1",
}
CLIENTS = {"fcfs": "AGING_S=0", "vtc": "ORDER=vtc"}  # neither looks at the class
MUCH = "much"
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


def client_figures(rows: pd.DataFrame) -> list[float]:
    """TTFT of the clients that send little and of the one that sends much, in seconds."""
    ttft = _ttft_s(rows)
    little = ttft[rows["user"] != MUCH]
    return [little.mean(), np.percentile(little, 99), ttft[rows["user"] == MUCH].mean()]


def class_figures(rows: pd.DataFrame) -> list[float]:
    """Mean TTFT by priority in seconds, and how many first tokens come within `EDF_TTFT_MS`, in percent."""
    ttft, priority = _ttft_s(rows), rows["priority"].to_numpy(dtype=int)
    due_s = np.array([float(ms) / 1e3 for ms in Policies().edf_ttft_ms.split(":")])
    return [*(ttft[priority == p].mean() for p in (2, 1, 0)), 100 * float((ttft <= due_s[priority]).mean())]


def _ttft_s(rows: pd.DataFrame) -> Values:
    ttft_s: Values = np.array([stamps[0] for stamps in rows["chunk_s"]]) - rows["scheduled_s"].to_numpy()
    return ttft_s


def with_clients_and_classes(folder: Path) -> Path:
    """The corpus of the project with a client and a class for each prompt, the same each time."""
    draws, lines = Draws(0), []
    for line in default_path().read_text(encoding="utf-8").splitlines():
        own = draws.uniform()
        user = MUCH if own < 0.6 else f"little-{int(10 * own)}"
        urgency = draws.uniform()
        priority = 2 if urgency < 0.2 else int(urgency < 0.7)
        lines.append(json.dumps(json.loads(line) | {"user": user, "priority": priority}))
    path = folder / "prompts.jsonl"
    write_corpus(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def layout_figures(rows: pd.DataFrame) -> list[float]:
    """TTFT p50 and p95, the 99th percentile of gaps between tokens and TPOT p50, all in milliseconds."""
    ttft = _ttft_s(rows)
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


def named(arms: Sequence[str], default: str) -> list[str]:
    """Each by what its first setting is."""
    return [arm.partition("=")[2] or default for arm in arms]


def table(title: str, names: Sequence[str], labels: Sequence[str], values: Values) -> str:
    """`values` (blocks, arms, figures), with ratios to the first arm where it never has 0."""
    lines = []
    for index, label in enumerate(labels):
        cells = [label]
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
    return render_table([title, *names], lines)


ORDER_NAMES = ["mean TTFT (s)", "TTFT p50 (s)", "TTFT p99 (s)", "longest overtaking (s)"]
CLIENT_NAMES = ["little: mean TTFT (s)", "little: TTFT p99 (s)", "much: mean TTFT (s)"]
CLASS_NAMES = [*(f"mean TTFT of priority {p} (s)" for p in (2, 1, 0)), "in time (%)"]
LAYOUT_NAMES = ["TTFT p50 (ms)", "TTFT p95 (ms)", "gap p99 (ms)", "TPOT p50 (ms)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--orders", type=Path, metavar="FILE", help="of a measured comparison instead")
    parser.add_argument("--layouts", type=Path, metavar="FILE", help="of a measured comparison instead")
    args = parser.parse_args()
    if args.orders:
        arms, values = measured(args.orders, order_figures)
        print(table("order", ORDER_NAMES, named(arms, "fcfs"), values))
    if args.layouts:
        arms, values = measured(args.layouts, layout_figures)
        print(table("layout", LAYOUT_NAMES, named(arms, "decode_first"), values))
    if args.orders or args.layouts:
        return
    costs = STEP | {"NULL_PROMPT_TOKEN_MS": "0.05"}
    orders = ["continuous", *(f"continuous@ORDER={order}" for order in ORDERS[1:])]
    for rate in ("10.2", "11.2"):
        options = ["--requests", "1500", "--rate", rate]
        values = np.array([simulated(orders, options, s, costs, order_figures) for s in range(args.seeds)])
        print(f"\norders at {rate} requests/s\n")
        print(table("order", ORDER_NAMES, named(orders, "fcfs"), values))
    with TemporaryDirectory() as folder:
        corpus = str(with_clients_and_classes(Path(folder)))
        options = ["--requests", "1500", "--rate", "11.2", "--corpus", corpus]
        for title, names, figures, settings in (
            ("clients", CLIENT_NAMES, client_figures, CLIENTS),
            ("classes", CLASS_NAMES, class_figures, CLASSES),
        ):
            # An arm without a setting is written without an @.
            arms = [f"continuous@{setting}".rstrip("@") for setting in settings.values()]
            values = np.array([simulated(arms, options, s, costs, figures) for s in range(args.seeds)])
            print(f"\n{title} at 11.2 requests/s\n")
            print(table(title, names, list(settings), values))
    layouts = ["continuous", *(f"continuous@STEP_LAYOUT={layout}" for layout in LAYOUTS[1:])]
    for rate in ("1.5", "2.2", "2.9"):
        options = ["--requests", "600", "--corpus", "synthetic:400x80", "--rate", rate]
        costs = STEP | {"NULL_PROMPT_TOKEN_MS": "0.5"}
        values = np.array([simulated(layouts, options, s, costs, layout_figures) for s in range(args.seeds)])
        print(f"\nlayouts at {rate} requests/s\n")
        print(table("layout", LAYOUT_NAMES, named(layouts, "decode_first"), values))


if __name__ == "__main__":
    main()
