"""What a line to the engine is, and the simplest make of it: a thread of this process.

Messages of `services.engine.messages` enter through `send`; `StepReport`s leave through a callback on the
event loop, one a step. A line is started once; when its engine is lost it says so and stays dead
(`services.engine_client.supervisor` makes the next one). Nothing here knows HTTP or what a request is. The
make that is normally used, a process of its own, is in `services.engine_client.process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Protocol

from adapters.base import BackendError, BackendInfo
from services.engine.engine import Message, QueueInbox
from services.engine.messages import EngineFailed, Ready, StepReport, Stop
from services.engine.spec import EngineSpec
from services.engine_client.wire import ToApi
from services.engine_client.worker import run_engine

STOP_WITHIN_S = 5.0

OnReport = Callable[[StepReport], None]
OnLost = Callable[[str], None]


class EngineLine(Protocol):
    """One engine, from its start to its end. All calls come from the event loop's thread."""

    async def start(self) -> BackendInfo:
        """Load the model.

        Raises:
            LabError: it cannot be loaded; the line is dead then.
        """
        ...

    def send(self, message: Message) -> None:
        """Never waits, whatever the engine does; does nothing once the engine is lost."""
        ...

    async def close(self) -> None:
        """End the engine after its current step, by force if that takes too long."""
        ...


MakeLine = Callable[[EngineSpec, OnReport, OnLost], EngineLine]


class EngineThread:
    """The engine in a thread of the API's process: for debugging, and to see what the process costs."""

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
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
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
                pass  # nobody waits for it any more: the service ends
