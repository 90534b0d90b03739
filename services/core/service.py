"""The service without HTTP: accepts requests, brings the engine's reports to them, ends them.

It owns the states starting, ok, draining and failed, the queue limit, the step log and the metrics. Whoever
gets a request from `accept` must `release` it, or the service never becomes idle. All of it runs on the
event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from adapters.registry import BACKENDS, load_tokenizer
from services import errors
from services.contract.requests import ChatRequest, GenerateRequest
from services.contract.status import Health, ModelCard
from services.contract.tokens import Detokenized, DetokenizeRequest, Tokens
from services.core.byte_limit import ByteLimit
from services.core.in_flight import InFlight
from services.core.inputs import InputProcessor, LoadedModel
from services.core.loss_record import LossRecord
from services.core.metrics import Metrics
from services.core.model_card import lab_version, model_card
from services.core.outputs import RequestState
from services.core.queue_limit import QueueLimit
from services.core.step_log import StepLog
from services.engine.messages import Cancel, Drain, StepReport, Submit
from services.engine_client.client import MakeClient
from services.engine_client.process import EngineProcess
from services.engine_client.supervisor import Supervisor
from services.engine_client.thread import EngineThread
from services.errors import ApiError
from services.settings import Settings
from services.strategies import VARIANTS

_ERRORS_WRITTEN_WITHIN_S = 1.0


class Service:
    """One model, one strategy, and the requests in flight."""

    def __init__(self, settings: Settings, make_client: MakeClient | None = None) -> None:
        """`make_client` is how the engine is reached; None takes what ENGINE_PROCESS says."""
        self.settings = settings
        self.created = int(time.time())
        self.steps = StepLog()
        self.byte_limit = ByteLimit()
        self._strategy = VARIANTS[settings.variant]
        self._spec = settings.engine_spec()
        if make_client is None:
            make_client = EngineProcess if settings.engine_process else EngineThread
        self._supervisor = Supervisor(
            self._spec, make_client, self._on_report, self._on_lost, self._on_restart
        )
        self._inputs: InputProcessor | None = None
        self._is_draining = False
        has_no_model = BACKENDS[settings.backend].weights == "none"
        model = settings.backend if has_no_model else settings.model  # until it says its own name
        self.metrics = Metrics(settings.variant, settings.backend, model)
        self.metrics.starting(lab_version(), settings.max_queue, lambda: self._supervisor.engine_pid)
        self._in_flight = InFlight(self.metrics)
        self._losses = LossRecord()
        self._limit = QueueLimit(settings.max_queue, settings.max_queue_tokens)
        self._idle = asyncio.Event()

    @property
    def model_name(self) -> str:
        """As answers name it."""
        return self.settings.model if self._inputs is None else self._inputs.loaded.info.model

    @property
    def status(self) -> Literal["ok", "starting", "draining", "failed"]:
        if self._is_draining:
            return "draining"
        match self._supervisor.state:
            case "failed":
                return "failed"
            case "running" if self._inputs is not None:
                return "ok"
            case _:
                return "starting"

    async def start(self) -> None:
        """Load the model and its tokenizer.

        Raises:
            LabError: with a sentence that says why that cannot work.
        """
        info = await self._supervisor.start()
        tokenizer = await asyncio.to_thread(load_tokenizer, self._spec.backend)
        limits = self._spec.limits(info)
        loaded = LoadedModel(info, tokenizer, limits, self._strategy.takes_groups)
        self.metrics.loaded(info, limits.kv_capacity_tokens)
        self._inputs = InputProcessor(self.settings, loaded, self.byte_limit)
        self._inputs.warm_up()

    async def accept(
        self,
        request: GenerateRequest | ChatRequest,
        request_id: str,
        arrival_s: float,
        *,
        exclusive: bool = False,
    ) -> RequestState:
        """Check a request and hand it to the engine. The caller must `release` what this returns.

        With `exclusive` it shares no step with others.

        Raises:
            ApiError: 4xx for what is wrong with it, 429 when the queue is full, 503 when none is
                accepted, or not this one, since the engine was lost with it twice.
        """
        inputs, in_flight, limit = self._accepting(), self._in_flight, self._limit
        inputs.check_before_tokenizing(request)
        if exclusive and self.settings.scheduling == "engine":
            raise errors.cannot_run_alone()
        num_prompts = request.n * (1 if isinstance(request, ChatRequest) else request.num_prompts)
        waiting = in_flight.num_waiting, in_flight.queue_depth, in_flight.queued_tokens
        with limit.enter(*waiting, num_prompts, time.monotonic()):
            sequences = await inputs.process(request, arrival_s, exclusive=exclusive)
            self._accepting()
            num_tokens = sum(seq.num_prompt_tokens for seq in sequences)
            limit.check_tokens(in_flight.num_waiting, in_flight.queued_tokens, num_tokens, time.monotonic())
            state = inputs.request_state(request, request_id, sequences)
            if refused_for_s := self._losses.refused_for_s(state.fingerprint):
                raise errors.lost_twice(refused_for_s)
            in_flight.add(state)
        self._supervisor.send(Submit(sequences))
        return state

    async def tokenize(self, request: GenerateRequest | ChatRequest) -> Tokens:
        """The prompt of a request as token ids. Raises: ApiError, as `accept` does."""
        inputs = self._accepting()
        token_ids = await inputs.tokenize(request)
        max_model_len = inputs.loaded.limits.max_model_len
        return Tokens(count=len(token_ids), max_model_len=max_model_len, tokens=token_ids)

    async def detokenize(self, request: DetokenizeRequest) -> Detokenized:
        """Raises: ApiError, as `accept` does."""
        return Detokenized(prompt=await self._accepting().detokenize(request))

    def fail(self, request: RequestState, error: ApiError) -> None:
        """End a request with an error; the engine forgets it at once."""
        request.fail(error)
        self._drop(request)

    def cancel(self, request_id: str) -> int:
        """Finish what is in flight under this id, as "abort"; returns how many prompts that were."""
        seq_ids = [
            choice.seq_id
            for request in self._in_flight.requests
            if request.request_id == request_id
            for choice in request.choices
            if choice.finish_reason is None
        ]
        if seq_ids:
            self._supervisor.send(Cancel(seq_ids))
        return len(seq_ids)

    def release(self, request: RequestState) -> None:
        """Nobody waits for this request any more, whatever became of it."""
        self._drop(request)
        self._in_flight.requests.discard(request)
        if not self._in_flight.requests:
            self._idle.set()
        metrics = self.metrics
        if request.error is not None:
            metrics.request_rejected(request.error.code)
        elif request.num_unfinished or request.was_aborted:
            metrics.request_cancelled()
        else:
            last_token_s = max(choice.last_token_s or request.arrival_s for choice in request.choices)
            metrics.request_finished(request.request_id, last_token_s - request.arrival_s)

    async def drain(self) -> int:
        """Accept no more, finish what was accepted; returns how many had to be cut off after the timeout."""
        timeout_s = self.settings.drain_timeout_s
        self._is_draining = True
        self._supervisor.send(Drain())
        if await self._is_idle_within(timeout_s):
            return 0
        return await self.cut_off(errors.drain_timed_out(timeout_s))

    async def cut_off(self, error: ApiError) -> int:
        """End every request with an error; returns how many."""
        self._is_draining = True
        cut = list(self._in_flight.requests)
        for request in cut:
            self.fail(request, error)
        await self._is_idle_within(_ERRORS_WRITTEN_WITHIN_S)
        return len(cut)

    async def close(self) -> None:
        await self._supervisor.close()

    def health(self) -> Health:
        worker = self._supervisor.state
        return Health(
            status=self.status,
            active_requests=len(self._in_flight.requests),
            queue_depth=self._in_flight.queue_depth,
            worker="in_process" if worker == "running" and not self.settings.engine_process else worker,
            gpu_utilization=self.metrics.gpu_utilization,
        )

    @property
    def outstanding_tokens(self) -> int:
        """By which a router may choose among replicas."""
        return self._in_flight.outstanding_tokens

    def metrics_page(self, accept: str) -> tuple[bytes, str]:
        """The series as they are now, in the best format that `accept` names, and its media type."""
        in_flight = self._in_flight
        self.metrics.load(len(in_flight.requests), in_flight.queue_depth, in_flight.num_running)
        self.metrics.state(self._supervisor.state, is_ready=self.status == "ok")
        return self.metrics.page(accept)

    def model_card(self) -> ModelCard:
        """What is loaded.

        Raises:
            ApiError: 503 while it is not.
        """
        if self._inputs is None:
            raise errors.starting()
        return model_card(self.settings, self._inputs.loaded.info)

    def _accepting(self) -> InputProcessor:
        """The input processor, if requests are accepted now.

        Raises:
            ApiError: 503, they are not.
        """
        if self._is_draining:
            raise errors.draining()
        if self._inputs is None:
            raise errors.starting()
        if self._supervisor.state != "running":
            raise errors.restarting()
        return self._inputs

    async def _is_idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._in_flight.requests:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _drop(self, request: RequestState) -> None:
        seq_ids = self._in_flight.drop(request)
        if seq_ids:
            self._supervisor.send(Cancel(seq_ids))

    def _on_report(self, report: StepReport) -> None:
        self.metrics.step(report)
        if report.record is not None:
            self.steps.add(report.record)
        stopped, num_started = self._in_flight.update(report)
        self._limit.started(num_started, self._in_flight.num_waiting, time.monotonic())
        if stopped:
            self._supervisor.send(Cancel(stopped, "stop"))

    def _on_lost(self, reason: str) -> None:
        in_flight = self._in_flight.requests
        self._losses.lost({request.fingerprint for request in in_flight if not request.is_over})
        self._in_flight.fail_all(errors.engine_lost(reason))
        self.metrics.step(StepReport())  # its cache went with it

    def _on_restart(self) -> None:
        self.metrics.worker_restarted()
