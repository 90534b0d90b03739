"""`lab serve`: one service, from its settings to the signal that ends it.

The port is bound first, so that health can be asked for while the model loads. A first SIGTERM or SIGINT
stops taking requests and lets accepted ones finish; a second one ends everything at once. The exit code is
0 after a clean end, 1 if accepted requests were cut off, 2 if the service could not start. Where the backend
has an environment of its own, the process becomes one of that environment's Python first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Collection, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar, cast

import uvicorn

from adapters.base import ConfigError, LabError
from adapters.registry import BACKENDS, interpreter_of
from services import errors
from services.core.service import Service
from services.http.app import create_app
from services.http.connection import Connection, ConnectionLimit, max_connections
from services.logs import set_up_logs
from services.memory import keep_trimmed
from services.read_settings import read_settings
from services.settings import Settings
from services.strategies import VARIANTS

logger = logging.getLogger("lab")

_BACKLOG = 2048
_MORE_LISTENERS = 15
_KEEP_ALIVE_S = 75
_PEER_TIMEOUT_MS = 60_000

ResultT = TypeVar("ResultT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", help=f"batching strategy: {', '.join(VARIANTS)}")
    parser.add_argument("--backend", help=f"what computes: {', '.join(BACKENDS)}")
    parser.add_argument(
        "--engine-scheduling",
        action="store_true",
        help="SCHEDULING=engine: the backend's own scheduler in place of a strategy, to see what that costs",
    )
    parser.add_argument("--model", help="a preset, a hub id or a local folder")
    parser.add_argument("--host", help=f"address to listen on (default {_default('host')})")
    parser.add_argument(
        "--port", help=f"port to listen on (default {_default('port')}; 0 takes a free one and prints it)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="assignments",
        help="any other setting, by its name in .env.example; may be repeated",
    )


def _default(name: str) -> str:
    return str(Settings.model_fields[name].default)


def run(args: argparse.Namespace, passed_over: Collection[str] = ()) -> int:
    """Serve until a signal; returns the exit code. `passed_over` are names in `.env` that others read.

    Raises:
        ConfigError: a setting cannot work, or the port cannot be had.
    """
    settings = read_settings(overrides(args), passed_over=passed_over)
    if (python := interpreter_of(settings.backend)) != sys.executable:
        os.execv(python, [python, *sys.orig_argv[1:]])
    set_up_logs(settings.log_level, settings.log_format)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with the engine's
    num_connections = max_connections(settings.max_connections)
    with listen_on(settings.host, settings.port) as listener:
        service = Service(settings)
        limit = ConnectionLimit(num_connections, service.metrics.request_rejected)
        config = uvicorn.Config(
            create_app(service),
            http=cast(type[Connection], partial(Connection, limit=limit)),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="error",  # its warnings tell of single clients, as our own log of requests does
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
        )
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            return runner.run(_serve(service, _Server(config), listener))


async def _serve(service: Service, server: uvicorn.Server, listener: socket.socket) -> int:
    signals = _Signals()
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logger.info("settings", extra={"fields": service.settings.resolved()})
    # uvloop accepts one connection a turn of the loop for each listener: behind a crowd /health waits long.
    listeners = [listener, *(listener.dup() for _ in range(_MORE_LISTENERS))]
    serving = asyncio.create_task(server.serve(sockets=listeners))
    serving.add_done_callback(lambda _: signals.first.set())  # without a server there is nothing to wait for
    trimming = asyncio.create_task(keep_trimmed())
    try:
        return await _live(service, signals, url)
    finally:
        trimming.cancel()
        server.should_exit = True
        await serving
        await service.close()


async def _live(service: Service, signals: _Signals, url: str) -> int:
    """From loading to the last answer; returns the exit code."""
    logger.info("loading on %s", url)
    try:
        await _unless(signals.first, service.start())
    except LabError as error:
        logger.error("the service cannot start: %s", error)
        return 2
    gc.collect()
    gc.freeze()  # what is loaded stays: no collection in the middle of a stream looks at it again
    if not signals.first.is_set():
        logger.info("ready on %s", url)
    await signals.first.wait()
    timeout_s = service.settings.drain_timeout_s
    logger.info("finishing accepted requests (up to %g s); a second signal ends them", timeout_s)
    num_cut = await _unless(signals.second, service.drain())
    if num_cut is None:
        num_cut = await service.cut_off(errors.draining())
    logger.info("stopped; %d accepted requests were cut off", num_cut)
    return 1 if num_cut else 0


class _Signals:
    """The first and the second signal, as events of the running loop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._catch)

    def _catch(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would stop listening at once, and then raise them again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, ResultT]) -> ResultT | None:
    """The result of `work`, or None if `event` comes first."""
    working, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        waiting.cancel()
        working.cancel()


def overrides(args: argparse.Namespace) -> dict[str, str]:
    """What the command line sets.

    Raises:
        ConfigError: an assignment without "=".
    """
    named = ("variant", "backend", "model", "host", "port")
    overrides = {name: value for name in named if (value := getattr(args, name)) is not None}
    if args.engine_scheduling:
        overrides["scheduling"] = "engine"
    for assignment in args.assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write it as NAME=VALUE")
        overrides[name.strip()] = value
    return overrides


def listen_on(host: str, port: int) -> socket.socket:
    """Take the port now, so that a second service fails before it loads a model.

    Raises:
        ConfigError: the port is taken, or the address is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY only where TCP is named
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # the last resort for a peer that takes nothing at all
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _PEER_TIMEOUT_MS)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "free it or set another PORT"
        if _is_about_the_address(error):
            advice = "set HOST to an address of this machine"
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}): {advice}") from error
    return listener


def _is_about_the_address(error: OSError | UnicodeError) -> bool:
    if isinstance(error, socket.gaierror | UnicodeError):  # no such name, or no name at all
        return True
    return error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
