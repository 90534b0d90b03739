"""What the engine is built from, as plain data that can be sent to another process.

The API builds the same limits from the same spec, so that both sides refuse the same requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from adapters.base import Backend, BackendConfig, BackendInfo, ConfigError, Scheduling
from adapters.registry import BACKENDS, create_backend, create_scheduling_engine
from services.engine.engine import Engine
from services.engine.limits import DEFAULTS, SchedulerLimits
from services.engine.message_loop import EngineLoop
from services.engine.messages import StepReport
from services.engine.own_scheduling import OwnSchedulingLoop
from services.engine.policies import Policies
from services.engine.scheduler import Scheduler
from services.logs import LogFormat, LogLevel
from services.strategies import VARIANTS
from services.strategies.base import StrategyConfig

PadStyle = Literal["lean", "generate"]


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """`num_threads` of the backend is always a number here: it is also needed before the process starts."""

    variant: str
    backend: BackendConfig = field(default_factory=BackendConfig)
    """MAX_BATCH, MAX_STEP_TOKENS and PREFILL_CHUNK are in it, for the backend and the scheduler alike."""
    scheduling: Scheduling = "lab"
    strategy_settings: dict[str, Any] = field(default_factory=dict)
    """What a `StrategyConfig` has beside MAX_BATCH."""
    long_prefill_token_threshold: int | None = None
    """None: what suits the backend on its device."""
    policies: Policies = field(default_factory=Policies)
    pad_finished: bool = DEFAULTS.pad_finished
    pad_style: PadStyle = "lean"
    aging_s: float = DEFAULTS.aging_s
    tick_s: float = 0.0
    log_level: LogLevel = "INFO"
    log_format: LogFormat = "console"
    heartbeat_timeout_s: float = 10.0
    step_timeout_s: float = 300.0

    @property
    def strategy(self) -> StrategyConfig:
        return StrategyConfig(self.backend.max_batch_size, **self.strategy_settings)

    def limits(self, info: BackendInfo) -> SchedulerLimits:
        """The scheduler's limits for what the backend has loaded.

        Raises:
            ConfigError: the backend cannot do what the policies ask for.
        """
        if self.policies.prefix_cache and not info.has_kv_blocks:
            raise ConfigError(
                f"PREFIX_CACHE=1 needs keys and values in blocks, which {info.backend} on {info.device} does "
                "not have: set PREFIX_CACHE=0, or use BACKEND=torch on a CPU"
            )
        threshold = self.long_prefill_token_threshold
        if threshold is None:
            kind_of_device = info.device.partition(":")[0]
            threshold = BACKENDS[info.backend].long_prefill_token_thresholds.get(kind_of_device, 0)
        limits = SchedulerLimits(
            kv_capacity_tokens=info.kv_capacity_tokens,
            max_model_len=info.max_model_len,
            max_batch=self.backend.max_batch_size,
            max_step_tokens=self.backend.max_step_tokens,
            prefill_chunk=self.backend.prefill_chunk,
            # A batch that ends together waits for its last one anyway.
            long_prefill_token_threshold=0 if VARIANTS[self.variant].keeps_finished_rows else threshold,
            pad_finished=self.pad_finished,
            pads_like_generate=self._pads_like_generate(info),
            aging_s=self.aging_s,
        )
        return self.policies.within(limits)

    def _pads_like_generate(self, info: BackendInfo) -> bool:
        """
        Raises:
            ConfigError: it is asked for where it cannot be had.
        """
        if self.pad_style == "lean" or not VARIANTS[self.variant].keeps_finished_rows:
            return False
        problem = None
        if not self.pad_finished:
            problem = "keeps finished rows, so it needs PAD_FINISHED=1"
        elif self.policies.kv_policy != "reserve" or self.policies.kv_capacity_tokens:
            problem = "lets rows grow past their budgets, so it needs KV_POLICY=reserve and all KV there is"
        elif not info.computes_padding:
            problem = (
                f"needs a backend that computes padding, torch on a CPU or null, not {info.backend} on "
                f"{info.device}"
            )
        if problem:
            raise ConfigError(f"PAD_STYLE=generate {problem}")
        return True


def build_engine(spec: EngineSpec, backend: Backend, publish: Callable[[StepReport], None]) -> Engine:
    """An engine around a loaded backend."""
    info = backend.info
    strategy = VARIANTS[spec.variant](spec.strategy)
    scheduler = Scheduler(strategy, spec.limits(info), info.eos_token_ids, spec.policies)
    return Engine(backend, scheduler, publish=publish, tick_s=spec.tick_s)


@contextmanager
def load_engine(
    spec: EngineSpec, publish: Callable[[StepReport], None]
) -> Iterator[tuple[EngineLoop, BackendInfo]]:
    """Load the model for the length of the block, and what serves it.

    Raises:
        LabError: it cannot be loaded.
    """
    if spec.scheduling == "engine":
        own = create_scheduling_engine(spec.backend)
        try:
            yield OwnSchedulingLoop(own, spec.limits(own.info), publish), own.info
        finally:
            own.close()
        return
    backend = create_backend(spec.backend)
    try:
        yield build_engine(spec, backend, publish), backend.info
    finally:
        backend.close()
