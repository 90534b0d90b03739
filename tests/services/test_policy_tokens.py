"""No policy changes a token: random combinations of all axes over a model with weights."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from adapters.base import Backend, SamplingParams, Sequence
from adapters.registry import create_backend
from services.admissions import ADMISSIONS
from services.engine.engine import Engine
from services.engine.limits import SchedulerLimits
from services.engine.messages import StepReport, Submit
from services.engine.policies import Policies
from services.engine.scheduler import Scheduler
from services.kv_policies import KV_POLICIES
from services.layouts import LAYOUTS
from services.orders import ORDERS
from services.strategies import VARIANTS
from services.strategies.base import StrategyConfig
from services.strategies.continuous import Continuous
from tests.adapters.configs import make_config
from tests.adapters.conformance import llama_cpp_backend, llama_cpp_with_a_shared_cache, tiny_llama
from tools.engine_drive import Work, drive

pytest.importorskip("torch", reason="needs the torch extra")

NUM_PROMPTS = int(os.environ.get("POLICY_PROMPTS", "32"))
NUM_COMBINATIONS = int(os.environ.get("POLICY_COMBINATIONS", "10"))


def work(num_prompts: int = NUM_PROMPTS) -> list[Work]:
    """Half of the prompts begin with a part of one of three texts, neighbours with the same."""
    rng = random.Random(5)
    texts = [[rng.randrange(256) for _ in range(80)] for _ in range(3)]
    items = []
    for n in range(num_prompts):
        own = [rng.randrange(256) for _ in range(rng.randint(1, 90))]
        common = texts[n // 8 % 3][: rng.randint(0, 80)] if n % 2 else []
        items.append(Work((common + own)[:100], rng.randint(1, 24), client=str(n % 3)))
    return items


@cache
def backend(dtype: str, *, cpu_kernels: bool = True) -> Backend:
    return create_backend(
        make_config(
            model=tiny_llama(),
            dtype=dtype,
            device="cpu",
            num_threads=1,
            max_batch_size=16,
            max_model_len=256,
            cpu_kernels=cpu_kernels,
        )
    )


def answers(
    loaded: Backend,
    variant: str,
    max_batch: int,
    max_step_tokens: int,
    policies: Policies,
    items: list[Work],
) -> tuple[list[list[int]], Counter[str]]:
    """The tokens of each prompt; how many sequences were preempted meanwhile, and how many tokens hit."""
    made: list[list[int]] = [[] for _ in range(len(items))]
    counts: Counter[str] = Counter()

    def publish(report: StepReport) -> None:
        if report.record:
            counts["preempted"] += report.record.num_preempted
            counts["hit"] += report.record.num_cached_tokens
        for update in report.updates:
            made[update.seq_id] += update.token_ids

    drive(
        loaded,
        variant,
        items,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        policies=policies,
        publish=publish,
    )
    return made, counts


@pytest.mark.parametrize("make", [llama_cpp_backend, llama_cpp_with_a_shared_cache])
def test_preemption_changes_no_token_of_llama_cpp(make: Callable[[], Backend]) -> None:
    loaded = make()
    items = [replace(item, token_ids=item.token_ids[:60]) for item in work()]
    policies = Policies(kv_policy="paged", kv_watermark=0.0, kv_capacity_tokens=112)
    truth, _ = answers(loaded, "baseline", 1, 512, Policies(), items)
    made, counts = answers(loaded, "continuous", 4, 512, policies, items)
    loaded.close()
    assert made == truth
    assert counts["preempted"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_combination_of_policies_changes_a_token(dtype: str) -> None:
    rng = random.Random(f"{dtype} 0")
    total: Counter[str] = Counter()
    truth, _ = answers(backend(dtype), "baseline", 1, 512, Policies(), work())
    assert [len(answer) for answer in truth] == [item.max_tokens for item in work()]
    for _ in range(NUM_COMBINATIONS):
        variant, max_batch = rng.choice(sorted(VARIANTS)), rng.randint(1, 16)
        kv_policy = rng.choice(sorted(KV_POLICIES))
        order = rng.choice(sorted(ORDERS))
        policies = Policies(
            order=order,
            admission=rng.choice(sorted(ADMISSIONS)),
            step_layout=rng.choice(sorted(LAYOUTS)),
            length_oracle=rng.choice(["max_tokens", "exact", "0.5", "2.0"]),
            kv_policy=kv_policy,
            kv_watermark=rng.choice([0.0, 0.05, 0.2]),
            prefix_cache=kv_policy == "paged" and rng.random() < 0.5,
            priority_preemption=(kv_policy, order) == ("paged", "fcfs"),
            # A batch that one request carries must fit as a whole.
            kv_capacity_tokens=128 * (max_batch if variant == "static" else rng.randint(1, 3)),
        )
        max_step_tokens = max_batch + rng.choice([16, 64, 256])
        made, counts = answers(backend(dtype), variant, max_batch, max_step_tokens, policies, work())
        assert made == truth, (variant, max_batch, max_step_tokens, policies)
        total += counts
    paged = Policies(kv_policy="paged", kv_capacity_tokens=160)
    made, counts = answers(backend(dtype), "continuous", 16, 64, paged, work())
    assert made == truth
    assert counts["preempted"] > 0
    assert NUM_COMBINATIONS < 10 or total.keys() >= {"preempted", "hit"}, "the drawn ones never had both"


@pytest.mark.parametrize(("dtype", "cpu_kernels"), [("fp32", True), ("bf16", True), ("fp32", False)])
def test_prefix_hits_and_preemptions_change_no_token_of_128_prompts(dtype: str, cpu_kernels: bool) -> None:
    """The shared blocks lie anywhere, are evicted under pressure and found again after a preemption."""
    loaded, items = backend(dtype, cpu_kernels=cpu_kernels), work(128)
    truth, _ = answers(loaded, "baseline", 1, 512, Policies(), items)
    policies = Policies(kv_policy="paged", prefix_cache=True, kv_capacity_tokens=512, kv_watermark=0.0)
    made, counts = answers(loaded, "continuous", 16, 64, policies, items)
    assert made == truth
    assert counts["preempted"] > 0
    assert counts["hit"] > 300


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_who_makes_way_for_a_higher_priority_goes_on_with_the_same_tokens(dtype: str) -> None:
    """A request of the highest priority every third step, to four slots that all others fill."""
    loaded, items = backend(dtype), work(32)
    truth, _ = answers(loaded, "baseline", 1, 512, Policies(), items)
    made: list[list[int]] = [[] for _ in items]
    num_preempted = 0

    def publish(report: StepReport) -> None:
        nonlocal num_preempted
        num_preempted += report.record.num_preempted if report.record else 0
        for update in report.updates:
            made[update.seq_id] += update.token_ids

    policies = Policies(kv_policy="paged", priority_preemption=True)
    limits = SchedulerLimits(512, loaded.info.max_model_len, max_batch=4, max_step_tokens=64)
    scheduler = Scheduler(Continuous(StrategyConfig(4)), limits, loaded.info.eos_token_ids, policies)
    engine = Engine(loaded, scheduler, publish=publish)
    sequences = [
        Sequence(
            n,
            item.token_ids,
            SamplingParams(max_tokens=item.max_tokens, ignore_eos=True),
            group_id=n,
            priority=2 * (n % 2),
        )
        for n, item in enumerate(items)
    ]
    engine.handle([Submit([seq]) for seq in sequences if not seq.priority])
    for seq in sequences:
        if seq.priority:
            for _ in range(3):
                engine.step()
            engine.handle([Submit([seq])])
    while scheduler.num_running or scheduler.queue_depth:
        engine.step()
    assert made == truth
    assert num_preempted > 5
