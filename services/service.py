"""The service itself, without HTTP: takes requests, brings the engine's reports to them, ends them.

Requests enter through `accept`, reports through the supervisor's callback; what leaves are `LiveRequest`s
that fill with news. It owns the states starting, ok, draining and failed, the queue limit, the step log
and the metrics. All of it runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Literal

from adapters.tokenizer import load_tokenizer
from services import refusals
from services.answers import Answer, LiveRequest
from services.contract import ChatRequest, GenerateRequest, Health, ModelCard
from services.messages import Cancel, Drain, StepReport, Submit
from services.metrics import Metrics
from services.model_card import model_card
from services.refusals import Refusal
from services.requests import LoadedModel, SequenceMaker
from services.settings import Settings
from services.step_log import StepLog
from services.strategies import VARIANTS
from services.supervisor import Supervisor
from services.worker import EngineProcess, EngineThread, MakeLine

_MAX_RETRY_AFTER_S = 60
_PACE_WEIGHT = 0.1
_ERRORS_WRITTEN_WITHIN_S = 1.0


class Service:
    """One model, one strategy, and the requests in flight."""

    def __init__(self, settings: Settings, make_line: MakeLine | None = None) -> None:
        """`make_line` is how the engine is reached; None takes what ENGINE_PROCESS says."""
        self.settings = settings
        self.created = int(time.time())
        self.steps = StepLog()
        self.metrics: Metrics | None = None
        """None until the model is loaded: its name is a label."""
        self._strategy = VARIANTS[settings.variant]
        self._spec = settings.engine_spec()
        if make_line is None:
            make_line = EngineProcess if settings.engine_process else EngineThread
        self._supervisor = Supervisor(self._spec, make_line, self._on_report, self._on_lost, self._on_restart)
        self._maker: SequenceMaker | None = None
        self._is_draining = False
        self._live: set[LiveRequest] = set()
        self._answers: dict[int, Answer] = {}
        self._num_running = 0
        self._nothing_live = asyncio.Event()
        self._pace_s = 0.0  # running mean of the time between two ends of requests, while there is a backlog
        self._last_end_s = 0.0

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
        self, request: GenerateRequest | ChatRequest, request_id: str, arrival_s: float
    ) -> LiveRequest:
        """Check a request and hand it to the engine. Whoever calls must `release` what this returns.

        Raises:
            Refusal: 4xx for what is wrong with it, 429 when the queue is full, 503 when nothing is taken.
        """
        maker = self._taking()
        sequences = await maker.make(request, arrival_s)
        self._taking()
        if self._is_queue_full():
            raise refusals.queue_full(self.settings.max_queue, self._retry_after_s())
        streams = [maker.loaded.tokenizer.stream() for _ in sequences]
        live = LiveRequest(request_id, sequences, streams, request.stop, streamed=request.stream)
        self._live.add(live)
        for answer in live.answers:
            self._answers[answer.seq_id] = answer
        self._supervisor.send(Submit(sequences))
        self._show_load()
        return live

    def fail(self, live: LiveRequest, refusal: Refusal) -> None:
        """End a request with an error; the engine forgets it at once."""
        live.fail(refusal)
        self._cancel(live)

    def release(self, live: LiveRequest) -> None:
        """Nobody waits for this request any more, whatever became of it."""
        self._live.discard(live)
        self._cancel(live)
        self._show_load()
        metrics = self.metrics
        assert metrics is not None
        if live.failure is not None:
            metrics.request_rejected(live.failure.code)
        elif live.num_open:
            metrics.request_cancelled()
        else:
            last_token_s = max(answer.last_token_s or live.arrival_s for answer in live.answers)
            metrics.request_ended(last_token_s - live.arrival_s)
            self._book_end(last_token_s)
        if not self._live:
            self._nothing_live.set()

    async def drain(self) -> int:
        """Take no more, finish what was accepted; returns how many had to be cut off after the timeout."""
        timeout_s = self.settings.drain_timeout_s
        self._is_draining = True
        self._supervisor.send(Drain())
        if await self._is_idle_within(timeout_s):
            return 0
        return await self.cut_off(refusals.drain_timed_out(timeout_s))

    async def cut_off(self, refusal: Refusal) -> int:
        """End every request with an error; returns how many."""
        self._is_draining = True
        num_cut = len(self._live)
        for live in self._live:
            self.fail(live, refusal)
        await self._is_idle_within(_ERRORS_WRITTEN_WITHIN_S)
        return num_cut

    async def close(self) -> None:
        await self._supervisor.close()

    def health(self) -> Health:
        worker = self._supervisor.state
        return Health(
            status=self.status,
            active_requests=len(self._live),
            queue_depth=self._queue_depth,
            worker="in_process" if worker == "running" and not self.settings.engine_process else worker,
        )

    def model_card(self) -> ModelCard:
        """What is loaded.

        Raises:
            Refusal: 503 while it is not.
        """
        if self._maker is None:
            raise refusals.starting()
        return model_card(self.settings, self._maker.loaded.info)

    def _taking(self) -> SequenceMaker:
        """What makes sequences, if requests are taken now."""
        if self._is_draining:
            raise refusals.draining()
        if self._maker is None:
            raise refusals.starting()
        if self._supervisor.state != "running":
            raise refusals.restarting()
        return self._maker

    def _is_queue_full(self) -> bool:
        """Counts requests none of whose prompts has a token, less those whose prompt is being computed."""
        num_without_token = sum(not live.has_begun for live in self._live)
        if num_without_token < self.settings.max_queue:
            return False
        num_open_begun = sum(live.num_open for live in self._live if live.has_begun)
        num_in_prefill = max(0, self._num_running - num_open_begun)
        return num_without_token - num_in_prefill >= self.settings.max_queue

    @property
    def _queue_depth(self) -> int:
        """Prompts without a place in the batch, those on their way to the engine included."""
        return max(0, len(self._answers) - self._num_running)

    def _show_load(self) -> None:
        if self.metrics is not None:
            self.metrics.load(len(self._live), self._queue_depth)

    def _retry_after_s(self) -> int:
        """By then about a batch of requests will have ended."""
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(self._pace_s * self.settings.max_batch)))

    def _book_end(self, now_s: float) -> None:
        if self._last_end_s and len(self._live) >= self.settings.max_batch:
            self._pace_s += _PACE_WEIGHT * (now_s - self._last_end_s - self._pace_s)
        self._last_end_s = now_s

    async def _is_idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._live:
                    self._nothing_live.clear()
                    await self._nothing_live.wait()
        except TimeoutError:
            return False
        return True

    def _cancel(self, live: LiveRequest) -> None:
        seq_ids = [a.seq_id for a in live.answers if self._answers.pop(a.seq_id, None) and a.ending is None]
        if seq_ids:
            self._supervisor.send(Cancel(seq_ids))

    def _on_report(self, report: StepReport) -> None:
        """Bring each update to its request. Sequences that nobody waits for any more are passed over."""
        self._num_running = report.num_running
        metrics = self.metrics
        if metrics is None:
            return
        metrics.step(report)
        record = report.record
        if record is not None:
            self.steps.add(record)
        now_s = 0.0 if record is None else record.start_s + record.duration_s
        stopped: list[int] = []
        for update in report.updates:
            answer = self._answers.get(update.seq_id)
            if answer is None:
                continue
            was_stopped = answer.stopped
            if not was_stopped:
                self._book_tokens(metrics, answer, len(update.token_ids), now_s)
            answer.live.take(answer, update)
            if answer.ending is not None:
                metrics.answer_ended(answer.ending.timings)
                del self._answers[answer.seq_id]
            elif answer.stopped and not was_stopped:
                stopped.append(answer.seq_id)
        self._show_load()
        if stopped:
            self._supervisor.send(Cancel(stopped, "stop"))

    @staticmethod
    def _book_tokens(metrics: Metrics, answer: Answer, num_tokens: int, now_s: float) -> None:
        if not num_tokens:
            return
        if answer.last_token_s is None:
            metrics.first_token(now_s - answer.live.arrival_s)
        else:
            metrics.next_tokens(now_s - answer.last_token_s, num_tokens)
        answer.last_token_s = now_s

    def _on_lost(self, reason: str) -> None:
        self._answers.clear()
        self._num_running = 0
        for live in self._live:
            live.fail(refusals.engine_lost(reason))

    def _on_restart(self) -> None:
        if self.metrics is not None:
            self.metrics.worker_restarted()
