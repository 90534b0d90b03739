"""What is refused: numbers that cannot work together, and requests that can never fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from adapters.base import BackendConfig, ConfigError, RequestTooLong
from adapters.null_backend import NullBackend
from services.engine.limits import SchedulerLimits
from services.engine.spec import EngineSpec
from services.strategies import VARIANTS
from tests.services.virtual_lab import LIMITS, VirtualLab


def test_a_step_must_hold_a_full_batch_and_one_chunk() -> None:
    numbers = r"MAX_STEP_TOKENS is 79.*16 \+ 64 = 80"
    with pytest.raises(ConfigError, match=numbers):
        SchedulerLimits(1000, 1000, max_batch=16, max_step_tokens=79, prefill_chunk=64)
    SchedulerLimits(1000, 1000, max_batch=16, max_step_tokens=80, prefill_chunk=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(LIMITS, max_batch=0), "max_batch is 0"),
        (lambda: replace(LIMITS, prefill_chunk=0), "prefill_chunk is 0"),
        (lambda: replace(LIMITS, kv_capacity_tokens=0), "kv_capacity_tokens is 0"),
        (lambda: replace(LIMITS, max_model_len=-1), "max_model_len is -1"),
        (lambda: replace(LIMITS, long_prefill_token_threshold=-1), "LONG_PREFILL_TOKEN_THRESHOLD is -1"),
        (lambda: replace(LIMITS, aging_s=-1.0), "AGING_S is -1"),
        (lambda: replace(LIMITS, aging_s=float("nan")), "AGING_S is nan"),
    ],
)
def test_a_limit_that_cannot_work_is_named(change: Callable[[], SchedulerLimits], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change()


def test_a_prompt_that_can_never_fit_is_refused_with_its_whole_group() -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, max_model_len=50))
    with pytest.raises(RequestTooLong, match="3 tokens and max_tokens is 48, 51 together; at most 50"):
        lab.submit(1, 48)
    assert lab.scheduler.queue_depth == 0
    lab.submit(1, 47)
    assert lab.scheduler.queue_depth == 2


def test_only_a_strategy_that_takes_groups_refuses_one_that_never_fits_as_a_whole() -> None:
    limits = replace(LIMITS, kv_capacity_tokens=100)
    with pytest.raises(RequestTooLong, match=r"4 prompts .* need 120 KV tokens; there are 100"):
        VirtualLab("static", limits=limits).submit(*[22] * 4, *[27] * 4)
    lab = VirtualLab("continuous", limits=limits)
    lab.submit(*[22] * 4, *[27] * 4)
    lab.run()
    assert lab.scheduler.kv_used_tokens == 0


@pytest.mark.parametrize(
    ("asked", "backend", "device", "threshold"),
    [
        (None, "torch", "cpu", 256),
        (None, "torch", "cuda:0", 0),
        (None, "llama_cpp", "cpu", 0),
        (0, "torch", "cpu", 0),
        (99, "torch", "cuda:0", 99),
    ],
)
def test_what_a_long_prompt_is_depends_on_the_backend(
    asked: int | None, backend: str, device: str, threshold: int
) -> None:
    info = replace(NullBackend(BackendConfig(backend="null")).info, backend=backend, device=device)
    for variant in VARIANTS:
        limits = EngineSpec(variant, long_prefill_token_threshold=asked).limits(info)
        ends_together = variant in ("static", "dynamic")
        assert limits.long_prefill_token_threshold == (0 if ends_together else threshold), variant
