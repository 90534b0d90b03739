"""`python -m tools.gpu_bench`: what the torch backend makes of a GPU, in one run of a few minutes.

What enters are models and a time budget; what leaves are Markdown tables and a parquet file with one row a
figure, written after every part. A part that does not fit into what is left of the budget is skipped and said
to be; one that fails is said to have failed, and the next one runs. No network. Parts are in `gpu_parts.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from adapters.torch_backend.loading import pick_device
from harness.machine import describe_host
from harness.manifest import utc_stamp
from harness.table import render_table
from tools.engine_drive import add_out_argument
from tools.result_file import write_rows


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work each part does."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    context: int = 256
    steps: int = 40
    prefill: tuple[int, ...] = (512, 2048)
    concurrency: tuple[int, ...] = (1, 16, 64, 256)
    lengths: tuple[int, int] = (100, 1024)
    copy_bytes: int = 4 << 30
    matrix: int = 8192
    answers: int = 8
    answer_tokens: int = 32
    foreign: int = 64
    """Requests for transformers' own continuous batching."""
    invariant_rows: tuple[int, ...] = (1, 16, 64, 256)
    max_step_tokens: int = 2048


QUICK = Sizes(
    rows=(1, 4),
    context=16,
    steps=3,
    prefill=(32,),
    concurrency=(1, 2),
    lengths=(4, 12),
    copy_bytes=16 << 20,
    matrix=256,
    answers=2,
    answer_tokens=6,
    foreign=0,
    invariant_rows=(1, 4),
    max_step_tokens=256,
)


@dataclass
class Bench:
    """The rows so far, and the time that is left."""

    device: str
    dtype: str
    sizes: Sizes
    seed: int
    budget_s: float
    path: Path
    artifacts_dir: str = "artifacts"
    started_s: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.started_s)

    def add(self, part: str, model: str, name: str, **figures: Any) -> None:
        self.rows.append({"part": part, "model": model, "name": name, **figures})

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def fits(self, what: str, needs_s: float) -> bool:
        """False, and noted, where `what` takes longer than is left."""
        if needs_s <= self.left_s:
            return True
        self.note(f"skipped: {what} (about {needs_s:.0f} s, {max(self.left_s, 0):.0f} s left)")
        return False

    def run(self, what: str, part: Callable[[], None], needs_s: float = 1.0) -> None:
        """One part, its failure noted; the file is written with what it brought."""
        if not self.fits(what, needs_s):
            return
        self.say(f"{what} ... ({self.left_s:.0f} s left)")
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            self.note(f"FAILED: {what}: {type(error).__name__}: {error}")
        write_rows(pd.DataFrame(self.rows), self.path, {**self.facts, "notes": self.notes})


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
    from tools import gpu_parts

    device = str(pick_device(args.device))
    sizes = QUICK if args.quick else Sizes()
    path = args.out / "gpu" / f"{utc_stamp()}.parquet"
    bench = Bench(device, args.dtype, sizes, args.seed, args.budget_s, path, args.artifacts_dir)
    bench.facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "device": device,
        **(
            _cuda_facts(device)
            if device.startswith("cuda")
            else {"device_name": describe_host()["cpu_model"]}
        ),
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
