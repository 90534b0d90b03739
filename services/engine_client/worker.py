"""The engine at work: loads the model, serves until told to stop, and says why if that fails.

A specification and an inbox enter; `Ready`, step reports and failures leave through `tell`. As a process of
its own (`run_process`) it also beats, so that the API can tell a long step from a hang. It ignores SIGINT and
SIGTERM, since both reach whole process groups and its parent decides; it ends with its parent, whose end
closes the pipe. How the API reaches it is in `services.engine_client.process`.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from adapters.base import LabError
from adapters.registry import create_backend
from services.engine.engine import Engine, Inbox, QueueInbox
from services.engine.messages import EngineFailed, Ready, Stop
from services.engine.spec import EngineSpec, build_engine
from services.engine_client.heartbeat import start_beating
from services.engine_client.wire import ToApi, pack
from services.logs import set_up_logs

logger = logging.getLogger(__name__)


def run_engine(
    spec: EngineSpec,
    inbox: Inbox,
    tell: Callable[[ToApi], None],
    on_built: Callable[[Engine], None] = lambda engine: None,
) -> None:
    """Load the model, serve until `Stop`, and tell why if that fails."""
    try:
        backend = create_backend(spec.backend)
        try:
            engine = build_engine(spec, backend, tell)
            on_built(engine)
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
    set_up_logs(spec.log_level, spec.log_format, process="engine")
    inbox = QueueInbox()
    threading.Thread(target=_feed, args=(connection, inbox), name="lab-receiver", daemon=True).start()
    writing = threading.Lock()  # reports and beats come from different threads

    def tell(message: ToApi) -> None:
        data = pack(message)
        try:
            with writing:
                connection.send_bytes(data)
        except OSError:
            os._exit(0)  # nobody is left to tell

    def on_built(engine: Engine) -> None:
        # What is loaded stays: no collection in the middle of a step looks at it again.
        gc.collect()
        gc.freeze()
        start_beating(tell, engine.busy_s)

    run_engine(spec, inbox, tell, on_built)


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
