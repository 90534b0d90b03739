"""The parts of `gpu_bench`: hardware, same tokens, steps against their floor, strategies, yardsticks.

Each part can fail alone.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapters.base import BackendConfig
from adapters.torch_backend import TorchOptions, factory, loading
from services.strategies import VARIANTS
from tools.engine_drive import Work, drive
from tools.gpu import measures
from tools.gpu.bench import Bench
from tools.gpu.shape_model import fits_memory, shape_folder
from tools.transformers_runs import load_reference, run_continuous_batching, run_generate

SHAPE_ONLY = ("lab-8b",)
"""Their 16 GB would take longer to write and read than to measure, and timing does not depend on values."""
_BASELINE_REQUESTS = 2


def hardware(bench: Bench) -> None:
    """Memory bandwidth and matrix rate, which the other parts are held against."""
    dtype = loading.pick_dtype(bench.dtype, torch.device(bench.device))
    bandwidth = measures.memory_bandwidth(bench.device, bench.sizes.copy_bytes)
    rate = measures.matrix_rate(bench.device, bench.sizes.matrix, dtype)
    bench.facts |= {"bytes_per_s": bandwidth, "operations_per_s": rate}
    bench.add("hardware", "", "memory bandwidth, GB/s", value=bandwidth / 1e9)
    bench.add("hardware", "", f"{str(dtype).removeprefix('torch.')} products, TFLOP/s", value=rate / 1e12)


def measure_model(bench: Bench, model: str) -> None:
    """All parts for one model, the ones that matter most first."""
    sizes = bench.sizes
    config = BackendConfig(
        model=model,
        device=bench.device,
        dtype=bench.dtype,
        max_batch_size=max(*sizes.rows, *sizes.concurrency),
        max_step_tokens=sizes.max_step_tokens,
        artifacts_dir=bench.artifacts_dir,
    )
    if model in SHAPE_ONLY:
        if not fits_memory(model, bench.device):
            bench.note(f"skipped: {model}, whose weights do not fit into the memory that is free")
            return
        bench.note(f"{model}: weights of this shape were made on the device; their values are noise")
        with tempfile.TemporaryDirectory() as parent, shape_folder(model, Path(parent)) as folder:
            _load_and_measure(bench, model, dataclasses.replace(config, model=str(folder)))
        return
    _load_and_measure(bench, model, config)
    free()
    bench.run(f"{model}: BATCH_INVARIANT", lambda: batch_invariant(bench, model, config), 30)


def _load_and_measure(bench: Bench, model: str, config: BackendConfig) -> None:
    loaded: list[measures.TorchModel] = []
    bench.run(f"{model}: load", lambda: loaded.append(load(bench, model, config)), 30)
    if not loaded:
        return
    backend, has_weights = loaded[0], model not in SHAPE_ONLY
    parts: list[tuple[str, float, Callable[[], None]]] = [
        ("decode steps", 10, lambda: decode_steps(bench, model, backend)),
        ("prompts", 5, lambda: prompts(bench, model, backend)),
        ("strategies", 10, lambda: strategies(bench, model, backend)),
    ]
    if has_weights:
        parts.insert(0, ("same tokens", 20, lambda: same_tokens(bench, model, config, backend)))
    work = make_work(bench, backend, bench.sizes.foreign) if has_weights else []
    if work:
        parts.append(("yardstick", 10, lambda: engine_of_yardstick(bench, model, backend, work)))
    for what, needs_s, part in parts:
        bench.run(f"{model}: {what}", part, needs_s)
    dtype = backend.info.dtype
    backend.close()
    free()
    if work:
        bench.run(f"{model}: transformers", lambda: foreign(bench, model, config, dtype, work), 60)


def load(bench: Bench, model: str, config: BackendConfig, name: str = "backend") -> measures.TorchModel:
    started_s = time.perf_counter()
    backend = factory.create(config)
    details = backend.info.details
    told = ("forward", "attention", "cuda_graphs", "self_test_error", "batch_invariant", "same_bits_rows")
    bench.add(
        "loaded",
        model,
        name,
        load_s=time.perf_counter() - started_s,
        max_model_len=backend.info.max_model_len,
        **{key: str(details[key]) for key in told if key in details},
    )
    return backend


def same_tokens(bench: Bench, model: str, config: BackendConfig, backend: measures.TorchModel) -> None:
    """Greedy answers of the engine, in one batch, against those of `generate()`, one by one."""
    sizes = bench.sizes
    work = make_work(bench, backend, sizes.answers, sizes.answer_tokens)
    reference = load_reference(config, backend.info.dtype, bench.device)
    started_s = time.perf_counter()
    want = run_generate(reference, work)
    generate_s = time.perf_counter() - started_s
    got: dict[int, list[int]] = {}

    def keep(report: Any) -> None:
        for update in report.updates:
            got.setdefault(update.seq_id, []).extend(update.token_ids)

    tokens = sizes.max_step_tokens
    drive(backend, "continuous", work, max_batch=len(work), max_step_tokens=tokens, publish=keep)
    same = sum(got[i] == want[i] for i in range(len(work)))
    before = [_common(got[i], want[i]) for i in range(len(work))]
    num_tokens = sum(item.max_tokens for item in work)
    bench.add(
        "same tokens as generate()", model, "greedy answers", answers=len(work), tokens=sizes.answer_tokens,
        equal=same / len(work), mean_equal_tokens=sum(before) / len(before),
        generate_tokens_per_s=num_tokens / generate_s,
    )  # fmt: skip


def engine_of_yardstick(bench: Bench, model: str, backend: measures.TorchModel, work: list[Work]) -> None:
    """The engine's rate on the work that transformers' own batching gets next."""
    _drive(bench, backend, "continuous", make_work(bench, backend, 2, 4), len(work))
    _time(
        bench,
        model,
        "engine, continuous",
        work,
        lambda: _drive(bench, backend, "continuous", work, len(work)),
    )


def foreign(bench: Bench, model: str, config: BackendConfig, dtype: str, work: list[Work]) -> None:
    """transformers' own continuous batching, with the memory for itself."""
    reference = load_reference(config, dtype, bench.device)
    run_continuous_batching(reference, [Work(item.token_ids[:8], 4) for item in work[:2]], bench.left_s)
    name = "transformers continuous batching"
    _time(bench, model, name, work, lambda: run_continuous_batching(reference, work, bench.left_s))


def _time(bench: Bench, model: str, name: str, work: list[Work], run: Callable[[], None]) -> None:
    started_s = time.perf_counter()
    run()
    took_s = time.perf_counter() - started_s
    num_tokens = sum(item.max_tokens for item in work)
    bench.add("yardsticks", model, name, requests=len(work), tokens_per_s=num_tokens / took_s)


def decode_steps(bench: Bench, model: str, backend: measures.TorchModel, name: str = "decode step") -> None:
    """Steps of 1 to 256 rows against the time that reading their weights, keys and values takes."""
    sizes, bandwidth = bench.sizes, bench.facts.get("bytes_per_s", float("nan"))
    rows = sizes.rows if name == "decode step" else sizes.invariant_rows
    for num_rows in rows:
        took_s = measures.decode_step_s(backend, num_rows, sizes.context, sizes.steps)
        floor_s = measures.decode_step_bytes(backend, num_rows, sizes.context) / bandwidth
        bench.add(
            "decode steps", model, name, rows=num_rows, context=sizes.context, step_ms=1e3 * took_s,
            floor_ms=1e3 * floor_s, of_bandwidth=floor_s / took_s, tokens_per_s=num_rows / took_s,
        )  # fmt: skip


def prompts(bench: Bench, model: str, backend: measures.TorchModel) -> None:
    """Prompt tokens a second against the rate of a large product; attention is not counted as work."""
    rate = bench.facts.get("operations_per_s", float("nan"))
    body, head = measures.num_multiplied_weights(backend)
    for num_tokens in bench.sizes.prefill:
        took_s = measures.prefill_step_s(backend, num_tokens, max(3, bench.sizes.steps // 4))
        operations = 2 * (num_tokens * body + head)
        bench.add(
            "prompts", model, "one prompt a step", tokens=num_tokens, step_ms=1e3 * took_s,
            tokens_per_s=num_tokens / took_s, of_matrix_rate=operations / rate / took_s,
        )  # fmt: skip


def strategies(bench: Bench, model: str, backend: measures.TorchModel) -> None:
    """The four through the direct engine, at several numbers of requests at a time."""
    rates: dict[str, float] = {}
    for concurrency in bench.sizes.concurrency:
        work = make_work(bench, backend, max(_BASELINE_REQUESTS, 2 * concurrency))
        for variant in VARIANTS:
            # One at a time is the same at any load: a few requests tell it.
            items = work[:_BASELINE_REQUESTS] if variant == "baseline" else work
            num_tokens = sum(item.max_tokens for item in items)
            needs_s = num_tokens / rates[variant] if variant in rates else 1.0
            if not bench.fits(f"{model}: {variant} at {concurrency}", needs_s):
                continue
            with measures.DeviceTimes(backend) as times:
                started_s = time.perf_counter()
                _drive(bench, backend, variant, items, concurrency)
                took_s = time.perf_counter() - started_s
            busy_s = times.busy_s()
            rates[variant] = num_tokens / took_s
            bench.add(
                "strategies", model, variant, concurrency=concurrency, requests=len(items),
                tokens_per_s=rates[variant], to_baseline=rates[variant] / rates.get("baseline", float("nan")),
                idle=None if busy_s is None else max(0.0, 1 - busy_s / took_s),
            )  # fmt: skip


def batch_invariant(bench: Bench, model: str, config: BackendConfig) -> None:
    """What the promise costs a decode step."""
    config = dataclasses.replace(config, options=TorchOptions(batch_invariant=True))
    backend = load(bench, model, config, "BATCH_INVARIANT=1")
    decode_steps(bench, model, backend, "BATCH_INVARIANT=1")
    backend.close()
    free()


def make_work(
    bench: Bench, backend: measures.TorchModel, count: int, max_tokens: int | None = None
) -> list[Work]:
    """Prompts and budgets of seeded lengths, cut to what the model holds."""
    rng = random.Random(bench.seed)
    shortest, longest = bench.sizes.lengths
    longest = min(longest, backend.info.max_model_len // 2)
    work = []
    for _ in range(count):
        num_prompt, num_new = rng.randint(shortest, longest), rng.randint(shortest, longest)
        ids = [rng.randrange(backend.info.vocab_size) for _ in range(num_prompt)]
        work.append(Work(ids, max_tokens or num_new))
    return work


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _drive(
    bench: Bench, backend: measures.TorchModel, variant: str, work: list[Work], max_batch: int
) -> None:
    tokens = max(bench.sizes.max_step_tokens, max_batch + 64)
    drive(backend, variant, work, max_batch=max_batch, max_step_tokens=tokens)


def _common(a: list[int], b: list[int]) -> int:
    """Equal tokens at the front."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
