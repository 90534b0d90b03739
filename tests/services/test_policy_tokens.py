"""No policy changes a token: random combinations of all axes over a model with weights."""

from __future__ import annotations

import os
import random
from functools import cache

import pytest

from adapters.base import Backend
from adapters.registry import create_backend
from services.engine.policies import Policies
from services.layouts import LAYOUTS
from services.orders import ORDERS
from services.strategies import VARIANTS
from tests.adapters.configs import make_config
from tests.adapters.conformance import tiny_llama
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
    dtype: str, variant: str, max_batch: int, max_step_tokens: int, policies: Policies
) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in range(NUM_PROMPTS)]
    drive(
        backend(dtype),
        variant,
        work(),
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        policies=policies,
        publish=lambda report: (
            [made[update.seq_id].extend(update.token_ids) for update in report.updates] and None
        ),
    )
    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_combination_of_policies_changes_a_token(dtype: str) -> None:
    rng = random.Random(dtype)
    truth = answers(dtype, "baseline", 1, 512, Policies())
    assert [len(answer) for answer in truth] == [item.max_tokens for item in work()]
    for _ in range(NUM_COMBINATIONS):
        variant, max_batch = rng.choice(sorted(VARIANTS)), rng.randint(1, 16)
        policies = Policies(
            order=rng.choice(sorted(ORDERS)),
            step_layout=rng.choice(sorted(LAYOUTS)),
            length_oracle=rng.choice(["max_tokens", "exact", "0.5", "2.0"]),
        )
        max_step_tokens = max_batch + rng.choice([16, 64, 256])
        assert answers(dtype, variant, max_batch, max_step_tokens, policies) == truth, (
            variant,
            max_batch,
            policies,
        )
