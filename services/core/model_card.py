"""What `/model` says: what is loaded, how it is batched, and how a client should send its prompts."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from adapters.base import BackendInfo
from services.contract.checks import MAX_PROMPTS
from services.contract.status import ModelCard
from services.engine.limits import SchedulerLimits
from services.settings import Settings
from services.strategies import VARIANTS

_NOT_OF_THE_ENGINE = {
    *(
        "host",
        "port",
        "max_connections",
        "api_key",
        "log_level",
        "log_format",
        "drain_timeout_s",
        "artifacts_dir",
    ),
    *("heartbeat_timeout_s", "step_timeout_s", "slow_reader_timeout_s", "max_unread_tokens"),
}


def lab_version() -> str:
    try:
        return version("batching-lab")
    except PackageNotFoundError:
        return "unknown"


def model_card(settings: Settings, info: BackendInfo) -> ModelCard:
    limits = settings.engine_spec().limits(info)
    takes_groups = VARIANTS[settings.variant].takes_groups
    return ModelCard(
        model=info.model,
        backend=info.backend,
        variant=settings.variant,
        device=info.device,
        dtype=info.dtype,
        vocab_size=info.vocab_size,
        eos_token_ids=list(info.eos_token_ids),
        max_batch_size=info.max_batch_size,
        max_model_len=info.max_model_len,
        kv_capacity_tokens=limits.kv_capacity_tokens,
        num_parameters=info.num_parameters,
        model_digest=info.model_digest,
        scheduling=settings.scheduling,
        num_threads=info.num_threads,
        details=info.details,
        strategy=_strategy(settings, limits),
        client_chunk=min(settings.max_batch, MAX_PROMPTS) if takes_groups else 1,
        max_queue=settings.max_queue,
        settings={k: v for k, v in settings.resolved().items() if k not in _NOT_OF_THE_ENGINE},
        given=sorted(settings.model_fields_set - _NOT_OF_THE_ENGINE),
        version=lab_version(),
        pid=os.getpid(),
    )


def _strategy(settings: Settings, limits: SchedulerLimits) -> dict[str, str | int | float | bool]:
    """What the lab's scheduler goes by; an engine that schedules itself has the size of its batch from it."""
    if settings.scheduling == "engine":
        return {"max_batch": settings.max_batch, "scheduling": settings.scheduling}
    policies = settings.engine_spec().policies
    pads = settings.pad_finished and VARIANTS[settings.variant].keeps_finished_rows
    return {
        "max_batch": settings.max_batch,
        "batch_wait_ms": settings.batch_wait_ms,
        "pad_finished": pads,
        **({"pad_style": settings.pad_style} if pads else {}),
        "long_prefill_token_threshold": limits.long_prefill_token_threshold,
        "order": policies.order,
        "admission": policies.admission,
        "step_layout": policies.step_layout,
        "kv_policy": policies.kv_policy,
        "priority_preemption": policies.priority_preemption,
        "prefix_cache": policies.prefix_cache,
    }
