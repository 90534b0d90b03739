"""The engine in a process of its own, from the API's side.

The socket between them is only read and written when it is ready, so an engine that is frozen, or dies in the
middle of a message, holds up nothing here. `services.engine_client.worker` is what runs on the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import cast

import psutil

from adapters.base import BackendError, BackendInfo
from services.engine.message_loop import Message
from services.engine.messages import Beat, EngineFailed, Ready, StepReport, Stop
from services.engine.spec import EngineSpec
from services.engine_client.client import STOP_WITHIN_S, OnLost, OnReport
from services.engine_client.heartbeat import INTERVAL_S, Watch
from services.engine_client.wire import unpack
from services.engine_client.worker import run_process

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("!i")


class EngineProcess:
    """An `EngineClient`: the engine runs in a spawned process at the other end of a socket pair."""

    def __init__(self, spec: EngineSpec, on_report: OnReport, on_lost: OnLost) -> None:
        self._spec = spec
        self._on_report = on_report
        self._on_lost = on_lost
        self._pipe: _Pipe | None = None
        self._ready: asyncio.Future[BackendInfo] | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._is_loaded = False
        self._watch: Watch | None = None
        self._checking: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> BackendInfo:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=True)
        process = context.Process(
            target=run_process, args=(theirs, self._spec), name="lab-engine", daemon=True
        )
        try:
            with _environment(_thread_settings(self._spec)), theirs:
                process.start()
        except BaseException:
            ours.close()
            raise
        self._process = process
        logger.info("the engine is process %d", process.pid)
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._watch = Watch(self._spec.heartbeat_timeout_s, self._spec.step_timeout_s, loop.time())
        self._check()
        self._pipe = await _open_pipe(ours, self._receive, lambda: self._lose(None))
        return await self._ready

    def send(self, message: Message) -> None:
        if self._pipe is not None:
            self._pipe.send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    async def close(self) -> None:
        process = self._process
        if process is None:
            return
        self.send(Stop())
        self._hang_up()
        if not self._is_loaded:
            process.kill()  # a model that is still loading would not hear of it
        await asyncio.to_thread(process.join, STOP_WITHIN_S)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)

    def _receive(self, data: bytes) -> None:
        message = unpack(data)
        now_s = asyncio.get_running_loop().time()
        if self._watch is not None:
            self._watch.heard(now_s, message.busy_s if isinstance(message, Beat) else 0.0)
        match message:
            case StepReport():
                self._on_report(message)
            case Ready(info):
                self._loaded(info)
            case EngineFailed(text):
                self._lose(text)
            case Beat():
                pass

    def _loaded(self, info: BackendInfo) -> None:
        """Let `start` return. Only from now on does silence mean that the engine hangs."""
        self._is_loaded = True
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(info)

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._watch is not None
        if not self._is_loaded and not self._is_stopped():
            self._watch.heard(loop.time())  # loading sends no beats
        wrong = self._watch.check(loop.time())
        if wrong is None:
            self._checking = loop.call_later(INTERVAL_S, self._check)
            return
        assert self._process is not None
        self._process.kill()  # a process that hangs may not hear of anything else
        self._lose(wrong)

    def _lose(self, reason: str | None) -> None:
        self._hang_up()
        if reason is None:
            reason = self._how_it_ended()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(BackendError(reason))
        else:
            self._on_lost(reason)

    def _hang_up(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _is_stopped(self) -> bool:
        """Whether a signal has stopped the process, as a debugger or SIGSTOP does."""
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        except psutil.Error:
            return False

    def _how_it_ended(self) -> str:
        assert self._process is not None
        self._process.join(0.2)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"


class _Pipe(asyncio.Protocol):
    """Our end: whole messages in and out, framed as `multiprocessing.Connection` frames them."""

    def __init__(self, on_message: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_end: Callable[[], None] | None = on_end
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        begin = 0
        while len(received) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received, begin)
            end = begin + _LENGTH.size + length
            if len(received) < end:
                break
            message = bytes(memoryview(received)[begin + _LENGTH.size : end])
            begin = end
            if self._on_end is not None:  # a message before this one may have led to `close`
                self._on_message(message)
        del received[:begin]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._on_end is not None:
            self._on_end()

    def send(self, message: bytes) -> None:
        assert self._transport is not None
        self._transport.write(_LENGTH.pack(len(message)) + message)

    def close(self) -> None:
        """Send what is still to be sent, if the other end takes it, and ignore what comes."""
        self._on_end = None
        if self._transport is not None:
            self._transport.close()


async def _open_pipe(
    connection: Connection, on_message: Callable[[bytes], None], on_end: Callable[[], None]
) -> _Pipe:
    with connection:  # asyncio takes a socket, not a `Connection`: go on with a copy of its descriptor
        ours = socket.socket(fileno=os.dup(connection.fileno()))
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    _, pipe = await loop.create_unix_connection(lambda: _Pipe(on_message, on_end), sock=ours)
    return pipe


def _thread_settings(spec: EngineSpec) -> dict[str, str]:
    """OpenMP reads them when torch is first imported, so they must be there when the process starts.

    PASSIVE: threads that spin while they wait starve the API beside them.
    """
    return {
        "OMP_NUM_THREADS": str(spec.backend.num_threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables within the block, for the processes that are started in it."""
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
