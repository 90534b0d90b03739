"""What the engine is built from, as plain data that can be sent to another process.

Settings enter as an `EngineSpec`; a loaded backend and an engine around it leave. The API builds the same
limits from the same spec, so that both sides refuse the same requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from adapters.base import Backend, BackendConfig, BackendInfo
from services.engine.engine import Engine
from services.engine.limits import SchedulerLimits
from services.engine.messages import StepReport
from services.engine.scheduler import Scheduler
from services.logs import LogFormat
from services.strategies import VARIANTS
from services.strategies.base import StrategyConfig

LONG_PREFILL_ON_CPU = 256
"""Tokens; such a prompt in one step costs what ten decode steps of sixteen rows cost (lab-26m)."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """`num_threads` of the backend is always a number here: it is also needed before the process starts."""

    variant: str
    backend: BackendConfig = field(default_factory=BackendConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    prefill_chunk: int = 16
    long_prefill_token_threshold: int | None = None
    """None: what suits the device."""
    pad_finished: bool = True
    aging_s: float = 10.0
    tick_s: float = 0.0
    log_level: str = "INFO"
    log_format: LogFormat = "console"
    silence_limit_s: float = 10.0
    """An engine process that lets nothing hear for this long is replaced; 0: never."""
    step_limit_s: float = 300.0
    """So is one that computes at one step for this long; 0: never."""

    def limits(self, info: BackendInfo) -> SchedulerLimits:
        """The scheduler's limits for what the backend has loaded."""
        threshold = self.long_prefill_token_threshold
        if threshold is None:
            # A GPU computes hundreds of prompt tokens in the time of a decode step, and llama.cpp takes twice
            # as long for a prompt in pieces of sixteen.
            threshold = LONG_PREFILL_ON_CPU if (info.backend, info.device) == ("torch", "cpu") else 0
        return SchedulerLimits(
            kv_capacity_tokens=info.kv_capacity_tokens,
            max_model_len=info.max_model_len,
            max_batch=self.strategy.max_batch,
            max_step_tokens=self.backend.max_step_tokens,
            prefill_chunk=self.prefill_chunk,
            # A batch that ends together waits for its last one anyway.
            long_prefill_token_threshold=0 if VARIANTS[self.variant].keeps_finished_rows else threshold,
            pad_finished=self.pad_finished,
            aging_s=self.aging_s,
        )


def build_engine(spec: EngineSpec, backend: Backend, publish: Callable[[StepReport], None]) -> Engine:
    """An engine around a loaded backend."""
    info = backend.info
    strategy = VARIANTS[spec.variant](spec.strategy)
    scheduler = Scheduler(strategy, spec.limits(info), info.eos_token_ids)
    return Engine(backend, scheduler, publish=publish, tick_s=spec.tick_s)
