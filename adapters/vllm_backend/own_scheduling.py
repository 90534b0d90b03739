"""vLLM with its own scheduler: `LLMEngine` steps at full speed, and decides what each step carries.

It runs in the lab's engine process, which is to the API what vLLM's own engine process is to its server:
HTTP, text and timeouts are on the other side of a pipe. What vLLM decides is read, and nothing of it changed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from typing import Any

from adapters.base import (
    BackendConfig,
    BackendError,
    BackendInfo,
    OwnStep,
    ScheduledChunk,
    Sequence,
    StepOutput,
)
from adapters.vllm_backend.loading import BLOCK_TOKENS, load_llm_engine, scheduler_of

logger = logging.getLogger(__name__)


class VllmScheduling:
    """A `SchedulingEngine` for Hugging Face folders."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model and its cache.

        Raises:
            ConfigError, BackendError: with what to change.
        """
        self._engine, self._info = load_llm_engine(config, steps_as_told=False)
        self._scheduler = scheduler_of(self._engine)
        self._sequences: dict[str, Sequence] = {}
        """By vLLM's id of the request."""
        self._request_ids: dict[int, str] = {}
        self._computed: list[ScheduledChunk] = []
        """By the steps whose results vLLM has taken since the last call."""
        self._preempted: list[int] = []
        self._num_preempted = 0
        self._watch()

    @property
    def info(self) -> BackendInfo:
        return self._info

    @property
    def has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def add(self, seq: Sequence) -> None:
        from vllm.inputs import TokensPrompt

        from adapters.vllm_backend.requests import vllm_params  # vLLM is there by now

        params, own_ends = seq.params, self._info.eos_token_ids
        ends_at = (*params.stop_token_ids, *(() if params.ignore_eos else own_ends))
        prompt = TokensPrompt(prompt_token_ids=seq.prompt_token_ids)
        try:
            request_id = self._engine.add_request(
                str(seq.seq_id), prompt, vllm_params(params, params.max_tokens, ends_at=ends_at)
            )
        except Exception as error:  # its errors have no common base
            raise BackendError(f"vLLM refuses the request: {type(error).__name__}: {error}") from error
        self._sequences[request_id] = seq
        self._request_ids[seq.seq_id] = request_id

    def step(self) -> OwnStep:
        self._computed, self._preempted = [], []
        try:
            made = self._engine.step()
        except Exception as error:
            raise BackendError(f"a step of vLLM failed: {type(error).__name__}: {error}") from error
        if self._preempted:
            self._num_preempted += len(self._preempted)
            logger.warning("vLLM preempted sequences, %d until now", self._num_preempted)
        scheduler = self._scheduler
        num_running, num_waiting = scheduler.get_request_counts()
        num_blocks = round(scheduler.kv_cache_manager.usage * self._info.details["num_kv_blocks"])
        return OwnStep(
            self._computed,
            [StepOutput(int(output.request_id), list(output.outputs[0].token_ids)) for output in made],
            [int(output.request_id) for output in made if output.finished],
            self._preempted,
            num_running,
            num_waiting,
            min(num_blocks * BLOCK_TOKENS, self._info.kv_capacity_tokens),
        )

    def release(self, seq_ids: Seq[int]) -> None:
        request_ids = [request_id for i in seq_ids if (request_id := self._request_ids.pop(i, None))]
        if request_ids:
            self._engine.abort_request(request_ids, internal=True)
        for request_id in request_ids:
            del self._sequences[request_id]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None

    def _watch(self) -> None:
        """Note each step as its results are taken, when the scheduler may be a step ahead already."""
        scheduler = self._scheduler
        update, preempt = scheduler.update_from_output, scheduler._preempt_request

        def update_and_note(planned: Any, *rest: Any, **named: Any) -> Any:
            self._note(planned)
            return update(planned, *rest, **named)

        def preempt_and_note(request: Any, *rest: Any, **named: Any) -> Any:
            if seq := self._sequences.get(request.request_id):
                self._preempted.append(seq.seq_id)
            return preempt(request, *rest, **named)

        scheduler.update_from_output = update_and_note
        scheduler._preempt_request = preempt_and_note

    def _note(self, planned: Any) -> None:
        cached = planned.scheduled_cached_reqs
        starts = {request.req_id: request.num_computed_tokens for request in planned.scheduled_new_reqs}
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, num_tokens in planned.num_scheduled_tokens.items():
            if seq := self._sequences.get(request_id):
                self._computed.append(ScheduledChunk(seq, starts[request_id], num_tokens))
