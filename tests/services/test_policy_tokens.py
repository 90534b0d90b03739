"""No policy changes a token: random combinations of all axes over a model with weights."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from adapters.base import Backend
from adapters.registry import create_backend
from services.engine.messages import StepReport
from services.engine.policies import Policies
from services.kv_policies import KV_POLICIES
from services.layouts import LAYOUTS
from services.orders import ORDERS
from services.strategies import VARIANTS
from tests.adapters.configs import make_config
from tests.adapters.conformance import llama_cpp_backend, llama_cpp_with_a_shared_cache, tiny_llama
from tools.engine_drive import Work, drive

pytest.importorskip("torch", reason="needs the torch extra")

NUM_PROMPTS = int(os.environ.get("POLICY_PROMPTS", "32"))
NUM_COMBINATIONS = int(os.environ.get("POLICY_COMBINATIONS", "10"))


def work() -> list[Work]:
    rng = random.Random(5)
    return [
        Work([rng.randrange(256) for _ in range(rng.randint(1, 90))], rng.randint(1, 24), client=str(n % 3))
        for n in range(NUM_PROMPTS)
    ]


@cache
def backend(dtype: str) -> Backend:
    return create_backend(
        make_config(
            model=tiny_llama(), dtype=dtype, device="cpu", num_threads=1, max_batch_size=16, max_model_len=256
        )
    )


def answers(
    loaded: Backend,
    variant: str,
    max_batch: int,
    max_step_tokens: int,
    policies: Policies,
    items: list[Work],
) -> tuple[list[list[int]], int]:
    """The tokens of each prompt, and how many sequences were preempted meanwhile."""
    made: list[list[int]] = [[] for _ in range(NUM_PROMPTS)]
    num_preempted = 0

    def publish(report: StepReport) -> None:
        nonlocal num_preempted
        num_preempted += report.record.num_preempted if report.record else 0
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
    return made, num_preempted


@pytest.mark.parametrize("make", [llama_cpp_backend, llama_cpp_with_a_shared_cache])
def test_preemption_changes_no_token_of_llama_cpp(make: Callable[[], Backend]) -> None:
    loaded = make()
    items = [replace(item, token_ids=item.token_ids[:60]) for item in work()]
    policies = Policies(kv_policy="paged", kv_watermark=0.0, kv_capacity_tokens=112)
    truth, _ = answers(loaded, "baseline", 1, 512, Policies(), items)
    made, num_preempted = answers(loaded, "continuous", 4, 512, policies, items)
    loaded.close()
    assert made == truth
    assert num_preempted > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_combination_of_policies_changes_a_token(dtype: str) -> None:
    rng = random.Random(dtype)
    num_preempted = 0
    truth, _ = answers(backend(dtype), "baseline", 1, 512, Policies(), work())
    assert [len(answer) for answer in truth] == [item.max_tokens for item in work()]
    for _ in range(NUM_COMBINATIONS):
        variant, max_batch = rng.choice(sorted(VARIANTS)), rng.randint(1, 16)
        policies = Policies(
            order=rng.choice(sorted(ORDERS)),
            step_layout=rng.choice(sorted(LAYOUTS)),
            length_oracle=rng.choice(["max_tokens", "exact", "0.5", "2.0"]),
            kv_policy=rng.choice(sorted(KV_POLICIES)),
            kv_watermark=rng.choice([0.0, 0.05, 0.2]),
            # A batch that one request carries must fit as a whole.
            kv_capacity_tokens=128 * (max_batch if variant == "static" else rng.randint(1, 3)),
        )
        max_step_tokens = max_batch + rng.choice([16, 64, 256])
        made, num = answers(backend(dtype), variant, max_batch, max_step_tokens, policies, work())
        assert made == truth, (variant, max_batch, max_step_tokens, policies)
        num_preempted += num
    paged = Policies(kv_policy="paged", kv_capacity_tokens=160)
    made, num = answers(backend(dtype), "continuous", 16, 64, paged, work())
    assert made == truth
    assert num > 0
    assert num_preempted > 0 or NUM_COMBINATIONS < 10, "the combinations drawn never ran out of memory"
