"""The service itself, without HTTP: takes requests, brings the engine's reports to them, ends them.

Requests enter through `accept`, reports through the supervisor's callback; what leaves are `LiveRequest`s
that fill with news. It owns the states starting, ok, draining and failed, the queue limit, the step log
and the metrics. All of it runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from adapters.text.tokenizer import load_tokenizer
from services import errors
from services.contract import ChatRequest, GenerateRequest, Health, ModelCard
from services.core.in_flight import InFlight
from services.core.inputs import LoadedModel, SequenceMaker
from services.core.metrics import Metrics
from services.core.model_card import model_card
from services.core.outputs import LiveRequest
from services.core.queue_limit import QueueLimit
from services.core.step_log import StepLog
from services.engine.messages import Cancel, Drain, StepReport, Submit
from services.engine_client.client import MakeClient
from services.engine_client.process import EngineProcess
from services.engine_client.supervisor import Supervisor
from services.engine_client.thread import EngineThread
from services.errors import Refusal
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
        self.metrics: Metrics | None = None
        """None until the model is loaded: its name is a label."""
        self._strategy = VARIANTS[settings.variant]
        self._spec = settings.engine_spec()
        if make_client is None:
            make_client = EngineProcess if settings.engine_process else EngineThread
        self._supervisor = Supervisor(
            self._spec, make_client, self._on_report, self._on_lost, self._on_restart
        )
        self._maker: SequenceMaker | None = None
        self._is_draining = False
        self._flight = InFlight()
        self._limit = QueueLimit(settings.max_queue, settings.max_queue_tokens)
        self._nothing_live = asyncio.Event()

    @property
    def model_name(self) -> str:
        """As answers name it."""
        return self.settings.model if self._maker is None else self._maker.loaded.info.model

    @property
    def status(self) -> Literal["ok", "starting", "draining", "failed"]:
        if self._is_draining:
            return "draining"
        match self._supervisor.state:
            case "failed":
                return "failed"
            case "running" if self._maker is not None:
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
        loaded = LoadedModel(info, tokenizer, self._spec.limits(info), self._strategy.takes_groups)
        self.metrics = Metrics(self.settings.variant, info.backend, info.model, info.kv_capacity_tokens)
        self._maker = SequenceMaker(self.settings, loaded)

    async def accept(
        self,
        request: GenerateRequest | ChatRequest,
        request_id: str,
        arrival_s: float,
        *,
        alone: bool = False,
    ) -> LiveRequest:
        """Check a request and hand it to the engine. Whoever calls must `release` what this returns.

        With `alone` it shares no step with others.

        Raises:
            Refusal: 4xx for what is wrong with it, 429 when the queue is full, 503 when nothing is taken.
        """
        maker, flight, limit = self._taking(), self._flight, self._limit
        maker.check_before_tokenizing(request)
        limit.enter(flight.num_waiting, flight.waiting_tokens, time.monotonic())
        try:
            sequences = await maker.make(request, arrival_s, alone=alone)
            self._taking()
            num_tokens = sum(seq.num_prompt_tokens for seq in sequences)
            limit.check_tokens(flight.num_waiting, flight.waiting_tokens, num_tokens, time.monotonic())
            live = maker.live_request(request, request_id, sequences)
            flight.add(live)
        finally:
            limit.entered()
        self._supervisor.send(Submit(sequences))
        self._show_load()
        return live

    def fail(self, live: LiveRequest, refusal: Refusal) -> None:
        """End a request with an error; the engine forgets it at once."""
        live.fail(refusal)
        self._drop(live)

    def cancel(self, request_id: str) -> int:
        """End what runs under this id with what it has, as "abort"; returns how many prompts that are."""
        seq_ids = [
            answer.seq_id
            for live in self._flight.live
            if live.request_id == request_id
            for answer in live.answers
            if answer.ending is None
        ]
        if seq_ids:
            self._supervisor.send(Cancel(seq_ids))
        return len(seq_ids)

    def release(self, live: LiveRequest) -> None:
        """Nobody waits for this request any more, whatever became of it."""
        self._drop(live)
        self._flight.live.discard(live)
        if not self._flight.live:
            self._nothing_live.set()
        self._show_load()
        metrics = self.metrics
        assert metrics is not None
        if live.failure is not None:
            metrics.request_rejected(live.failure.code)
        elif live.num_open or live.was_aborted:
            metrics.request_cancelled()
        else:
            last_token_s = max(answer.last_token_s or live.arrival_s for answer in live.answers)
            metrics.request_ended(last_token_s - live.arrival_s)

    async def drain(self) -> int:
        """Take no more, finish what was accepted; returns how many had to be cut off after the timeout."""
        timeout_s = self.settings.drain_timeout_s
        self._is_draining = True
        self._supervisor.send(Drain())
        if await self._is_idle_within(timeout_s):
            return 0
        return await self.cut_off(errors.drain_timed_out(timeout_s))

    async def cut_off(self, refusal: Refusal) -> int:
        """End every request with an error; returns how many."""
        self._is_draining = True
        cut = list(self._flight.live)
        for live in cut:
            self.fail(live, refusal)
        await self._is_idle_within(_ERRORS_WRITTEN_WITHIN_S)
        return len(cut)

    async def close(self) -> None:
        await self._supervisor.close()

    def health(self) -> Health:
        worker = self._supervisor.state
        return Health(
            status=self.status,
            active_requests=len(self._flight.live),
            queue_depth=self._flight.queue_depth,
            worker="in_process" if worker == "running" and not self.settings.engine_process else worker,
        )

    def model_card(self) -> ModelCard:
        """What is loaded.

        Raises:
            Refusal: 503 while it is not.
        """
        if self._maker is None:
            raise errors.starting()
        return model_card(self.settings, self._maker.loaded.info)

    def _taking(self) -> SequenceMaker:
        """What makes sequences, if requests are taken now."""
        if self._is_draining:
            raise errors.draining()
        if self._maker is None:
            raise errors.starting()
        if self._supervisor.state != "running":
            raise errors.restarting()
        return self._maker

    def _show_load(self) -> None:
        if self.metrics is not None:
            self.metrics.load(len(self._flight.live), self._flight.queue_depth)

    async def _is_idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._flight.live:
                    self._nothing_live.clear()
                    await self._nothing_live.wait()
        except TimeoutError:
            return False
        return True

    def _drop(self, live: LiveRequest) -> None:
        seq_ids = self._flight.drop(live)
        if seq_ids:
            self._supervisor.send(Cancel(seq_ids))

    def _on_report(self, report: StepReport) -> None:
        metrics = self.metrics
        if metrics is None:
            return
        metrics.step(report)
        if report.record is not None:
            self.steps.add(report.record)
        stopped, num_started = self._flight.take(report, metrics)
        self._limit.started(num_started, self._flight.num_waiting, time.monotonic())
        self._show_load()
        if stopped:
            self._supervisor.send(Cancel(stopped, "stop"))

    def _on_lost(self, reason: str) -> None:
        self._flight.lose(errors.engine_lost(reason))
        if self.metrics is not None:
            self.metrics.step(StepReport())  # its cache went with it

    def _on_restart(self) -> None:
        if self.metrics is not None:
            self.metrics.worker_restarted()
