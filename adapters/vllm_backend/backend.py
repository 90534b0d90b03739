"""The vLLM backend: the lab decides who has a row in a step, vLLM how prompts are cut and computed.

Two things differ from a backend that computes what it is told, and `info.details` names them. vLLM cuts
prompts by its own budget, which is MAX_STEP_TOKENS too. A dead row goes on answering, so its context grows by
one token a step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from adapters.base import BackendConfig, BackendError, BackendInfo, EngineFigure, ScheduledChunk, StepOutput
from adapters.chunks import check_chunks
from adapters.vllm_backend.loading import load_llm_engine, scheduler_of

if TYPE_CHECKING:
    from adapters.vllm_backend.scheduler import StepScheduler

logger = logging.getLogger(__name__)


class VllmBackend:
    """A `Backend` for Hugging Face folders."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model and its cache.

        Raises:
            ConfigError, BackendError: with what to change.
        """
        self._engine, self._info = load_llm_engine(config, steps_as_told=True)
        from adapters.vllm_backend.requests import Requests  # vLLM reads the environment as it is imported

        self._scheduler: StepScheduler = scheduler_of(self._engine)
        self._requests = Requests(self._engine, self._scheduler, self._info.max_model_len)
        self._slots: dict[int, int] = {}
        """Tokens of each sequence that the lab counts as computed."""

    @property
    def info(self) -> BackendInfo:
        return self._info

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        """Steps vLLM as often as it takes until `chunks` are computed.

        Raises:
            BackendError: a chunk does not continue what its slot holds, or vLLM failed.
            CapacityError: more sequences than slots, or a sequence longer than a slot.
        """
        check_chunks(chunks, self._slots, self._info.max_batch_size, self._info.max_model_len)
        num_preempted = self._scheduler.num_preempted
        try:
            tokens = self._requests.compute(chunks)
        except BackendError:
            # vLLM counts a step as computed before it is: chunks that are given again start from nothing.
            for chunk in chunks:
                self._requests.cancel(chunk.seq.seq_id)
            raise
        if self._scheduler.num_preempted > num_preempted:
            logger.warning("vLLM preempted sequences, %d until now", self._scheduler.num_preempted)
        for chunk in chunks:
            self._slots[chunk.seq.seq_id] = chunk.start + chunk.num_tokens
        return [StepOutput(seq_id, [token]) for seq_id, token in tokens.items()]

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self._slots.pop(seq_id, None)
            self._requests.cancel(seq_id)

    def figures(self) -> Mapping[EngineFigure, float]:
        scheduler = self._scheduler
        return {
            "preemptions": scheduler.num_preempted,
            "kv_usage_ratio": scheduler.kv_cache_manager.usage,
            "kv_usage_peak_ratio": scheduler.peak_kv_usage,
            "requests": len(scheduler.requests),
            "scheduled_requests": scheduler.num_scheduled_requests,
        }

    def close(self) -> None:
        if self._engine is not None:
            share = 100 * self._scheduler.peak_kv_usage
            num_preempted = self._scheduler.num_preempted
            logger.info("vLLM used up to %.0f%% of its KV blocks, preempted %d times", share, num_preempted)
            self._engine.engine_core.shutdown()
            self._engine = None
