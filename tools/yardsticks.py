"""`lab yardsticks`: how far the engine is from what else could run the same weights on the same threads.

Six contestants answer the same prompts: the engine one by one, continuous and in static batches that compute
what those of `generate()` do; `generate()` one by one and in padded batches; and transformers' own continuous
batching. Then decode steps are held against their matrix products, and against those of plain linear layers.
All of it runs in this process without HTTP, in interleaved blocks. With `--engines` it is
`tools.engine_yardsticks` that runs, with `--served` `tools.served_yardsticks`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from adapters.base import SamplingParams, ScheduledChunk, Sequence
from adapters.registry import load_tokenizer
from adapters.torch_backend.backend import TorchBackend
from adapters.torch_backend.model.kernel_llama import KernelLlama
from adapters.torch_backend.model.linear import KernelLinear, TiledLinear
from harness.plan.corpus import default_path, load_corpus
from harness.results.output_dir import utc_stamp
from tools import engine_yardsticks, served_yardsticks
from tools.engine_drive import Work, add_common_arguments, cpu_config, drive
from tools.result_file import write_rows
from tools.transformers_runs import load_reference, run_continuous_batching, run_generate, run_padded_generate

ONE_BY_ONE = "engine, one by one"
CONTINUOUS = "engine, continuous"
STATIC = "engine, static, PAD_STYLE=generate"
GENERATE = "generate(), one by one"
PADDED = "generate(), padded batches of 16"
TRANSFORMERS = "transformers continuous batching"
_STEP_CONTEXT = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--requests", type=int, default=16, help="prompts in each block (default 16)")
    parser.add_argument("--blocks", type=int, default=3, help="interleaved blocks (default 3)")
    parser.add_argument(
        "--engines",
        nargs="+",
        metavar="BACKEND[:FORMAT]",
        help="these backends beside one another instead, in fp32 unless the format or --dtype says otherwise",
    )
    parser.add_argument(
        "--served",
        nargs="+",
        metavar="BACKEND[:FORMAT]|NAME=URL",
        help="over HTTP instead, 16 users: these backends as services, and servers that run already",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write `OUT/yardsticks/<UTC time>.parquet`."""
    if args.engines or args.served:
        return engine_yardsticks.run(args) if args.engines else served_yardsticks.run(args)
    config = cpu_config(args, max(16, *args.rows))
    backend = TorchBackend(config)
    reference = load_reference(config, backend.info.dtype)
    tokenizer = load_tokenizer(config)
    prompts = load_corpus(default_path()).prompts[: args.requests]
    texts = [(p.prompt, p.max_tokens) for p in prompts if isinstance(p.prompt, str)]
    work = [Work(tokenizer.encode(text), max_tokens) for text, max_tokens in texts]
    contestants: dict[str, Callable[[list[Work]], Any]] = {
        ONE_BY_ONE: lambda items: drive(backend, "baseline", items),
        CONTINUOUS: lambda items: drive(backend, "continuous", items),
        STATIC: lambda items: drive(backend, "static", items, pads_like_generate=True),
        GENERATE: lambda items: run_generate(reference, items),
        PADDED: lambda items: run_padded_generate(reference, items),
        TRANSFORMERS: lambda items: run_continuous_batching(reference, items),
    }
    rows: list[dict[str, Any]] = []
    num_tokens = sum(item.max_tokens for item in work)
    _say(f"{len(work)} prompts, {num_tokens} tokens to make, {backend.info.num_threads} engine thread(s)")
    for contest in contestants.values():
        # All of them: memory of a slot is mapped when it is first written.
        contest([dataclasses.replace(item, max_tokens=2) for item in work])
    for block in range(args.blocks):
        names = list(contestants)
        for name in names[block % len(names) :] + names[: block % len(names)]:
            started_s = time.perf_counter()
            contestants[name](work)
            seconds = time.perf_counter() - started_s
            rows.append({"block": block, "name": name, "num_tokens": num_tokens, "seconds": seconds})
            _say(f"block {block + 1}/{args.blocks}: {name}: {num_tokens / seconds:.0f} tokens/s")
        for num_rows in args.rows:
            timed = _time_step(backend, reference, num_rows)
            rows += [{"block": block, "num_rows": num_rows, **row} for row in timed]
    frame = pd.DataFrame(rows)
    path = args.out / "yardsticks" / f"{utc_stamp()}.parquet"
    write_rows(frame, path, {"backend": dataclasses.asdict(backend.info)})
    _print(frame, backend)
    _say(f"rows: {path}")
    return 0


def _time_step(backend: TorchBackend, model: Any, num_rows: int) -> Iterator[dict[str, Any]]:
    """Median times of a decode step, of its matrix products, and of those by a plain linear layer."""
    sequences = [
        Sequence(10_000 + i, [(7 * i + 13 * j) % 251 for j in range(_STEP_CONTEXT)], SamplingParams())
        for i in range(num_rows)
    ]
    for seq in sequences:
        (output,) = backend.step([ScheduledChunk(seq, 0, _STEP_CONTEXT)])
        seq.output_token_ids += output.token_ids
    chunks = [ScheduledChunk(seq, _STEP_CONTEXT, 1) for seq in sequences]
    layers = [m for m in backend.module.modules() if isinstance(m, TiledLinear | KernelLinear)]
    packed = list(dict.fromkeys(layers))
    plain = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {n: torch.randn(num_rows, n, dtype=packed[0].dtype) for n in {m.in_features for m in packed}}

    def plain_products() -> None:
        for weight in plain:
            F.linear(inputs[weight.shape[1]], weight)

    seconds: defaultdict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[[], Any]) -> None:
        started_s = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - started_s)

    kernels = backend.module.kernels if isinstance(backend.module, KernelLlama) else None
    with torch.inference_mode():
        for _ in range(31):
            if kernels is not None:
                kernels.take_part_seconds()
            timed("decode step", lambda: backend.step(chunks))
            if kernels is not None:
                # By themselves they would be 40 calls from Python, and slower than within the step.
                seconds["matrix products, packed"].append(kernels.take_part_seconds()["matrix products"])
            else:
                timed("matrix products, packed", lambda: [m(inputs[m.in_features]) for m in packed])
            timed("matrix products, plain", plain_products)
    backend.release([seq.seq_id for seq in sequences])
    for name, values in seconds.items():
        yield {"name": name, "num_tokens": num_rows, "seconds": statistics.median(values)}


def _print(frame: pd.DataFrame, backend: TorchBackend) -> None:
    """Throughput with ratios to each other, then steps against their matrix products; medians of blocks."""
    info = backend.info
    console = Console()
    runs = frame[frame["num_rows"].isna()].assign(rate=lambda f: f["num_tokens"] / f["seconds"])
    rates = runs.pivot(index="block", columns="name", values="rate")
    table = Table(title=f"{info.model}, {info.dtype}, {info.num_threads} thread(s): output tokens/s")
    for column in ("", "median", "of generate()", "of transformers' batching"):
        table.add_column(column, justify="left" if not column else "right")
    for name in (ONE_BY_ONE, CONTINUOUS, STATIC, GENERATE, PADDED, TRANSFORMERS):
        ratios = [f"{(rates[name] / rates[other]).median():.2f}x" for other in (GENERATE, TRANSFORMERS)]
        table.add_row(name, f"{rates[name].median():.0f}", *ratios)
    console.print(table)
    console.print(
        "transformers' continuous batching is made for GPUs. On a CPU it runs without the kernels and graphs "
        "it was written for: its rate here says nothing of its scheduling."
    )

    steps = frame[frame["num_rows"].notna()].assign(ms=lambda f: f["seconds"] * 1e3)
    times = steps.pivot_table(index="num_rows", columns="name", values="ms", aggfunc="median")
    table = Table(title=f"one decode step at context {_STEP_CONTEXT}, ms")
    for column in ("rows", "step", "products, packed", "products, plain", "step / packed", "step / plain"):
        table.add_column(column, justify="right")
    for num_rows, row in times.iterrows():
        step = row["decode step"]
        floors = [row["matrix products, packed"], row["matrix products, plain"]]
        cells = [f"{value:.2f}" for value in (step, *floors)] + [f"{step / floor:.2f}x" for floor in floors]
        table.add_row(f"{num_rows:.0f}", *cells)
    console.print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
