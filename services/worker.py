"""The line between the API and the engine, in two makes: another process, or a thread of this one.

Messages of `services.messages` enter through `send`; `StepReport`s leave through a callback on the event
loop, one a step. A line is started once; when its engine is lost it says so and stays dead
(`services.supervisor` makes the next one). Nothing here knows HTTP or what a request is.

The process ignores SIGINT and SIGTERM, since both reach whole process groups and its parent decides;
it ends with its parent, whose end closes the pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Protocol

from adapters.base import BackendError, BackendInfo, LabError
from adapters.registry import create_backend
from services.engine import Inbox, Message, QueueInbox
from services.engine_spec import EngineSpec, build_engine
from services.messages import EngineFailed, Ready, StepReport, Stop
from services.wire import ToApi, pack, unpack

logger = logging.getLogger(__name__)

_STOP_WITHIN_S = 5.0

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
        """Never waits for a step; does nothing once the engine is lost."""
        ...

    async def close(self) -> None:
        """End the engine after its current step, by force if that takes too long."""
        ...


MakeLine = Callable[[EngineSpec, OnReport, OnLost], EngineLine]


class EngineProcess:
    """The engine in a spawned process, at the other end of a pipe."""

    def __init__(self, spec: EngineSpec, on_report: OnReport, on_lost: OnLost) -> None:
        self._spec = spec
        self._on_report = on_report
        self._on_lost = on_lost
        self._connection: Connection | None = None
        self._ready: asyncio.Future[BackendInfo] | None = None
        self._process: multiprocessing.process.BaseProcess | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> BackendInfo:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=True)
        process = context.Process(
            target=run_process, args=(theirs, self._spec), name="lab-engine", daemon=True
        )
        self._process = process
        with _environment(_thread_settings(self._spec)), theirs:
            process.start()
        logger.info("the engine is process %d", process.pid)
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._connection = ours
        loop.add_reader(ours.fileno(), self._receive, ours)
        return await self._ready

    def send(self, message: Message) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):  # its end shows on the reading side
                self._connection.send(message)

    async def close(self) -> None:
        process = self._process
        if process is None:
            return
        self.send(Stop())
        self._hang_up()
        if self._ready is None or not self._ready.done():
            process.kill()  # a model that is still loading would not hear of it
        await asyncio.to_thread(process.join, _STOP_WITHIN_S)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)

    def _receive(self, connection: Connection) -> None:
        """One message is there, or the other end is gone."""
        try:
            message = unpack(connection.recv_bytes())
        except (EOFError, OSError):
            self._lose(None)
            return
        match message:
            case StepReport():
                self._on_report(message)
            case Ready(info):
                self._settle(info)
            case EngineFailed(text):
                self._lose(text)

    def _settle(self, info: BackendInfo) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(info)

    def _lose(self, reason: str | None) -> None:
        self._hang_up()
        if reason is None:
            reason = self._how_it_ended()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(BackendError(reason))
        else:
            self._on_lost(reason)

    def _hang_up(self) -> None:
        if self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _how_it_ended(self) -> str:
        assert self._process is not None
        self._process.join(0.2)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"


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
            await asyncio.to_thread(self._thread.join, _STOP_WITHIN_S)

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
            case Ready():
                pass  # nobody waits for it any more: the service ends


def run_engine(spec: EngineSpec, inbox: Inbox, tell: Callable[[ToApi], None]) -> None:
    """Load the model, serve until `Stop`, and tell why if that fails."""
    try:
        backend = create_backend(spec.backend)
        try:
            engine = build_engine(spec, backend, tell)
            tell(Ready(backend.info))
            engine.run(inbox)
        finally:
            backend.close()
    except LabError as error:
        tell(EngineFailed(str(error)))
    except Exception as error:
        logger.exception("the engine failed")
        tell(EngineFailed(f"{type(error).__name__}: {error}"))


def run_process(connection: Connection, spec: EngineSpec) -> None:
    """What the spawned process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(
        level=spec.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s engine: %(message)s"
    )
    inbox = QueueInbox()
    threading.Thread(target=_feed, args=(connection, inbox), name="lab-receiver", daemon=True).start()

    def tell(message: ToApi) -> None:
        try:
            connection.send_bytes(pack(message))
        except OSError:
            os._exit(0)  # nobody is left to tell

    run_engine(spec, inbox, tell)


def _feed(connection: Connection, inbox: QueueInbox) -> None:
    """Empty the pipe at once, so that the API never waits for a step. The pipe's end is the process's."""
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        inbox.put(message)
        if isinstance(message, Stop):
            return


def _thread_settings(spec: EngineSpec) -> dict[str, str]:
    """OpenMP reads these before the first import, and spinning threads starve the API beside them."""
    return {
        "OMP_NUM_THREADS": str(spec.backend.num_threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """For processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
