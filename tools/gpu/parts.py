"""The parts of `gpu_bench`, each the whole work of one process: `tools.gpu.plan` says which and when."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from adapters.base import BackendConfig, SamplingParams
from adapters.torch_backend import loading
from services.strategies import VARIANTS
from tools.gpu import measures
from tools.gpu.backend import ModelSize, check_memory, drive_all, free, load, loadable, make_work
from tools.gpu.part import PartRun
from tools.transformers_runs import load_reference, run_generate

_BASELINE_REQUESTS = 2
_STEPS = "decode steps"
_USUAL = "decode step"
_LONGEST = 12
_SAMPLED = {
    "greedy": SamplingParams(),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "temperature 0.8, top_k 50, top_p 0.9": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
    "temperature 0.8, penalties": SamplingParams(
        temperature=0.8, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.2
    ),
}


def same_tokens(part: PartRun) -> None:
    """Greedy answers of the engine, in one batch, against those of `generate()`, one by one."""
    with loadable(part, max_batch_size=part.sizes.answers) as config:
        _same_tokens(part, dataclasses.replace(config, dtype="float32"))
        free()
        if config.dtype != "float32":
            part.run(config.dtype, lambda: _same_tokens(part, config))


def _same_tokens(part: PartRun, config: BackendConfig) -> None:
    check_memory(part, config)
    sizes = part.sizes
    reference = load_reference(config, config.dtype, config.device)
    model = ModelSize(reference.config.vocab_size, reference.config.max_position_embeddings)
    work = make_work(part, sizes.answers, model, max_tokens=sizes.answer_tokens)
    want = run_generate(reference, work)
    del reference
    free()  # the engine gets the memory for itself
    backend = load(part, config)
    got: dict[int, list[int]] = {}

    def keep(report: Any) -> None:
        for update in report.updates:
            got.setdefault(update.seq_id, []).extend(update.token_ids)

    drive_all(part, backend, "continuous", work, len(work), keep)
    equal = [got[i] == want[i] for i in range(len(work))]
    before = [_common(got[i], want[i]) for i in range(len(work))]
    part.add(
        "same tokens as generate()", "greedy answers", dtype=backend.info.dtype, answers=len(work),
        tokens=sizes.answer_tokens, equal_answers=sum(equal), mean_equal_tokens=sum(before) / len(before),
    )  # fmt: skip
    backend.close()


def steps(part: PartRun) -> None:
    """The machine, then decode steps against their floor, their kernels, and prompts."""
    _hardware(part)
    with loadable(part) as config:
        backend = load(part, config)
        rows = measures.DecodeRows(backend, max(part.sizes.rows), part.sizes.context)
        part.run("decode steps", lambda: _decode_steps(part, backend, rows, part.sizes.rows, _USUAL))
        part.run("kernels", lambda: _profile(part, backend, rows, config.device))
        rows.release()
        part.run("prompts", lambda: _prompts(part, backend))


def plain_steps(part: PartRun) -> None:
    """Decode steps without our Triton kernels."""
    _compared_steps(part, "without Triton kernels")


def invariant_steps(part: PartRun) -> None:
    """What the promise of BATCH_INVARIANT costs a decode step."""
    _compared_steps(part, "BATCH_INVARIANT=1")


def _compared_steps(part: PartRun, name: str) -> None:
    if "bytes_per_s" not in part.facts:
        _hardware(part)
    with loadable(part) as config:
        backend = load(part, config)
        rows = measures.DecodeRows(backend, max(part.sizes.few_rows), part.sizes.context)
        _decode_steps(part, backend, rows, part.sizes.few_rows, name)


def sampled_steps(part: PartRun) -> None:
    """Decode steps whose rows are all sampled, as ratios to greedy ones."""
    with loadable(part) as config:
        backend = load(part, config)
        rows = measures.DecodeRows(backend, max(part.sizes.few_rows), part.sizes.context)
        greedy: dict[int, float] = {}
        for name, params in _SAMPLED.items():
            part.say(name)
            for num_rows in part.sizes.few_rows:
                took_s = measures.step_s(backend, rows.chunks(num_rows, params), part.sizes.steps)
                greedy.setdefault(num_rows, took_s)
                part.add(
                    "sampled decode steps", name, rows=num_rows, step_ms=1e3 * took_s,
                    to_greedy=took_s / greedy[num_rows],
                )  # fmt: skip


def strategies(part: PartRun) -> None:
    """The four through the engine without HTTP; the baseline, which is the same at any load, only once."""
    with loadable(part) as config:
        backend = load(part, config)
        drive_all(part, backend, "continuous", make_work(part, 2, backend.info, max_tokens=4), 2)
        rates: dict[str, float] = {}
        for concurrency in part.sizes.concurrency:
            work = make_work(part, max(_BASELINE_REQUESTS, 2 * concurrency), backend.info)
            for variant in ("baseline", *sorted(set(VARIANTS) - {"baseline"})):
                if variant == "baseline" and variant in rates:
                    continue
                # One at a time is the same at any load: a few requests tell it.
                items = work[:_BASELINE_REQUESTS] if variant == "baseline" else work
                num_tokens = sum(item.max_tokens for item in items)
                # At worst a step takes as long at any number of rows.
                slowest = rates.get(variant, float("inf")) * min(1.0, concurrency / part.sizes.concurrency[0])
                what = f"{variant} at {concurrency}"
                if not part.fits(what, 1.0 + num_tokens / slowest):
                    continue
                part.say(f"{what} ... ({part.left_s:.0f} s left)")
                with measures.DeviceTimes(backend) as times:
                    started_s = time.perf_counter()
                    drive_all(part, backend, variant, items, concurrency)
                    took_s = time.perf_counter() - started_s
                busy_s = times.busy_s()
                rate = num_tokens / took_s
                rates.setdefault(variant, rate)
                part.add(
                    "strategies", variant, concurrency=1 if variant == "baseline" else concurrency,
                    requests=len(items), tokens_per_s=rate,
                    to_baseline=rate / rates.get("baseline", float("nan")),
                    idle=None if busy_s is None else max(0.0, 1 - busy_s / took_s),
                )  # fmt: skip


def _hardware(part: PartRun) -> None:
    """Memory bandwidth and matrix rate, which steps and prompts are held against."""
    device = str(loading.pick_device(part.device))
    dtype = loading.pick_dtype(part.dtype, torch.device(device))
    bandwidth = measures.memory_bandwidth(device, part.sizes.copy_bytes)
    rate = measures.matrix_rate(device, part.sizes.matrix, dtype)
    part.add_facts(bytes_per_s=bandwidth, operations_per_s=rate)
    part.add("hardware", "large copy, large product", gb_per_s=bandwidth / 1e9, tflop_per_s=rate / 1e12)
    free()


def _decode_steps(
    part: PartRun,
    backend: measures.TorchModel,
    rows: measures.DecodeRows,
    counts: tuple[int, ...],
    name: str,
) -> None:
    """Against the time that reading the weights, keys and values once takes."""
    bandwidth = part.facts.get("bytes_per_s", float("nan"))
    for num_rows in counts:
        took_s = measures.step_s(backend, rows.chunks(num_rows), part.sizes.steps)
        floor_s = measures.decode_step_bytes(backend, num_rows, part.sizes.context) / bandwidth
        usual_ms = part.known("step_ms", _STEPS, name=_USUAL, rows=num_rows)
        part.add(
            _STEPS, name, rows=num_rows, step_ms=1e3 * took_s, floor_ms=1e3 * floor_s,
            to_floor=took_s / floor_s, tokens_per_s=num_rows / took_s,
            to_usual=1e3 * took_s / usual_ms if usual_ms and name != _USUAL else None,
        )  # fmt: skip


def _profile(part: PartRun, backend: measures.TorchModel, rows: measures.DecodeRows, device: str) -> None:
    for num_rows in part.sizes.profiled_rows:
        kernels = measures.kernels_of_step(backend, rows.chunks(num_rows), device)
        count, busy = sum(k.calls for k in kernels), sum(k.microseconds for k in kernels)
        part.add("kernels of a decode step", "all", rows=num_rows, calls=count, us=busy)
        for kernel in kernels[:_LONGEST]:
            part.add(
                "kernels of a decode step", kernel.name[:80], rows=num_rows, calls=kernel.calls,
                us=kernel.microseconds,
            )  # fmt: skip


def _prompts(part: PartRun, backend: measures.TorchModel) -> None:
    """Prompt tokens a second against the rate of a large product; attention is not counted as work."""
    rate = part.facts.get("operations_per_s", float("nan"))
    body, head = measures.num_multiplied_weights(backend)
    for wanted in part.sizes.prefill:
        num_tokens = min(wanted, backend.info.max_model_len - 1)
        took_s = measures.prefill_step_s(backend, num_tokens, max(3, part.sizes.steps // 4))
        operations = 2 * (num_tokens * body + head)
        part.add(
            "prompts", "one prompt a step", tokens=num_tokens, step_ms=1e3 * took_s,
            tokens_per_s=num_tokens / took_s, of_matrix_rate=operations / rate / took_s,
        )  # fmt: skip


def _common(a: list[int], b: list[int]) -> int:
    """Equal tokens at the front."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
