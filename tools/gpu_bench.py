"""`python -m tools.gpu_bench`: what the torch backend makes of a GPU, in one run of a few minutes.

It has a time budget. A part that needs more time than is left is skipped, and a part that fails does not stop
the next one; both are reported. The parquet file is written after every part. No network is used.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pandas as pd
import torch
import transformers

from adapters.torch_backend.loading import pick_device
from harness.replay.machine import describe_host
from harness.results.output_dir import utc_stamp
from harness.results.table import render_table
from tools.engine_drive import add_out_argument
from tools.gpu.bench import QUICK, Bench, Sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp16 or fp32")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["lab-1b", "lab-8b", "lab-26m"],
        help="presets; of lab-8b only the shape is taken, its weights are made on the device",
    )
    parser.add_argument("--budget-s", type=float, default=450, help="seconds in all (default 450)")
    parser.add_argument("--quick", action="store_true", help="very little work: does the script itself run?")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths and prompts")
    parser.add_argument("--artifacts-dir", default="artifacts")
    add_out_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write `OUT/gpu/<UTC time>.parquet`."""
    from tools.gpu import parts as gpu_parts

    device = str(pick_device(args.device))
    sizes = QUICK if args.quick else Sizes()
    path = args.out / "gpu" / f"{utc_stamp()}.parquet"
    bench = Bench(device, args.dtype, sizes, args.seed, args.budget_s, path, args.artifacts_dir)
    bench.facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "device": device,
        **(_cuda_facts(device) if device.startswith("cuda") else {"device_name": describe_host().cpu_model}),
        "sizes": str(sizes),
    }
    bench.run("hardware", lambda: gpu_parts.hardware(bench))
    for model in args.models:
        gpu_parts.measure_model(bench, model)
    print(", ".join(f"{name} {value}" for name, value in bench.facts.items() if name != "sizes"))
    frame = pd.DataFrame(bench.rows, columns=None if bench.rows else ["part"])
    for part, rows in frame.groupby("part", sort=False):
        print(f"\n### {part}\n\n{_table(rows.drop(columns='part').dropna(axis=1, how='all'))}")
    for note in bench.notes:
        print(f"- {note}")
    print(f"\nrows: {path}")
    return 0


def _cuda_facts(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device_name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def _table(frame: pd.DataFrame) -> str:
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return render_table([str(name) for name in frame.columns], cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return "-"
        return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.3f}"
    return str(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gpu_bench", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
