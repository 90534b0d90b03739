"""`python -m tools.gpu_bench`: what the torch backend makes of a GPU, in one run of a few minutes.

Parts run in processes of their own, most valuable first. One that fails or hangs costs only itself; one that
does not fit the time budget is skipped; both are reported. Results are written after every part, to
`OUT/gpu/<UTC time>/`: rows.parquet, tables.md, log.txt. No network is used. This process imports no torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys

from harness.results.output_dir import make_folder, utc_stamp
from tools.engine_drive import add_out_argument
from tools.gpu.plan import NAMES, QUICK, Sizes, make_plan
from tools.gpu.processes import Bench

_PACKAGES = ("torch", "transformers", "triton", "flash-attn", "flash-attn-3", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp16 or fp32 (default auto)")
    parser.add_argument(
        "--models",
        nargs="+",
        help="presets, the most important first: it gets every part before the others get more than their "
        "decode steps. Only their shape is taken; weights are made on the device (default lab-8b lab-1b; "
        "with --quick lab-26m)",
    )
    parser.add_argument(
        "--real-model",
        help="the model whose own weights answer in the part `same` (default lab-110m; with --quick lab-26m)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        help="same: tokens against generate(), also of --real-model; steps: decode steps, their "
        "kernels, prompts; strategies; invariant: BATCH_INVARIANT; sampled; yardstick: transformers' "
        "continuous batching; plain: steps without Triton kernels (default all, in this order)",
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        help="seconds in all (default 470; with --quick 1800); what does not fit is skipped",
    )
    parser.add_argument("--quick", action="store_true", help="very little work: does the script itself run?")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths and prompts (default 0)")
    parser.add_argument("--artifacts-dir", default="artifacts")
    add_out_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run the parts; returns 1 where one of them failed. One that was skipped has not."""
    folder = args.out / "gpu" / utc_stamp()
    make_folder(folder)
    sizes = QUICK if args.quick else Sizes()
    models = args.models or (["lab-26m"] if args.quick else ["lab-8b", "lab-1b"])
    real_model = args.real_model or ("lab-26m" if args.quick else "lab-110m")
    plan = make_plan(args.parts, models, real_model=real_model)
    budget_s = args.budget_s or (1800.0 if args.quick else 470.0)
    bench = Bench(
        folder,
        args.device,
        args.dtype,
        sizes,
        args.seed,
        budget_s,
        os.path.abspath(args.artifacts_dir),
        6.0 if args.quick else 1.0,
        {"nvidia_smi": _nvidia_smi(), **_versions(), "commit": _commit(), "sizes": str(sizes)},
    )
    if bench.facts["vllm"] is None:
        bench.notes.append("vLLM is not installed here: not compared")
    else:
        bench.notes.append("vLLM is compared by `lab yardsticks --engines torch vllm --dtype bf16`, not here")
    print("\n".join(f"{name}: {value}" for name, value in bench.facts.items()), flush=True)
    for part in plan:
        bench.run(part)
    print(f"\n{budget_s - bench.left_s:.0f} s in all; {folder}/tables.md, rows.parquet, log.txt")
    return int(bench.has_failed)


def _nvidia_smi() -> str | None:
    query = "--query-gpu=name,driver_version,memory.total,memory.used"
    return _output("nvidia-smi", query, "--format=csv,noheader")


def _commit() -> str | None:
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12")


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="gpu_bench", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
