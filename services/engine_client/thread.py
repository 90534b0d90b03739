"""The engine in a thread of the API's process: for debugging, and to see what a process of its own costs.

Reports reach the event loop through `call_soon_threadsafe`, one a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

from adapters.base import BackendError, BackendInfo
from services.engine.message_loop import Message, QueueInbox
from services.engine.messages import EngineFailed, Ready, StepReport, Stop
from services.engine.spec import EngineSpec
from services.engine_client.client import STOP_WITHIN_S, OnLost, OnReport
from services.engine_client.wire import ToApi
from services.engine_client.worker import run_engine


class EngineThread:
    """An `EngineClient`."""

    def __init__(self, spec: EngineSpec, on_report: OnReport, on_lost: OnLost) -> None:
        self._spec = spec
        self._on_report = on_report
        self._on_lost = on_lost
        self._inbox = QueueInbox()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[BackendInfo] | None = None
        self._thread = threading.Thread(target=self._run, name="lab-engine", daemon=True)

    async def start(self) -> BackendInfo:
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._thread.start()
        return await self._ready

    def send(self, message: Message) -> None:
        self._inbox.put(message)

    async def close(self) -> None:
        self._inbox.put(Stop())
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, STOP_WITHIN_S)

    def _run(self) -> None:
        run_engine(self._spec, self._inbox, self._tell)

    def _tell(self, message: ToApi) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service has ended
            self._loop.call_soon_threadsafe(self._receive, message)

    def _receive(self, message: ToApi) -> None:
        assert self._ready is not None
        is_loading = not self._ready.done()
        match message:
            case StepReport():
                self._on_report(message)
            case Ready(info) if is_loading:
                self._ready.set_result(info)
            case EngineFailed(text) if is_loading:
                self._ready.set_exception(BackendError(text))
            case EngineFailed(text):
                self._on_lost(text)
            case _:
                pass  # `start` was cancelled: the service ends
