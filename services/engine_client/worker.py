"""What the engine's thread or process runs: load the model, serve until told to stop, say why if that fails.

The process ignores SIGINT and SIGTERM, since both reach whole process groups and its parent decides. It ends
with its parent, whose end closes the pipe; one that is stopped then is ended by the kernel (Linux).
`services.engine_client.process` is the API's side.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from adapters.base import LabError
from services.engine.message_loop import EngineLoop, Inbox, QueueInbox
from services.engine.messages import EngineFailed, Ready, Stop
from services.engine.spec import EngineSpec, load_engine
from services.engine_client.heartbeat import start_beating
from services.engine_client.wire import ToApi, pack
from services.logs import set_up_logs

logger = logging.getLogger(__name__)


def run_engine(
    spec: EngineSpec,
    inbox: Inbox,
    tell: Callable[[ToApi], None],
    on_built: Callable[[EngineLoop], None] = lambda engine: None,
) -> None:
    """Load the model, serve until `Stop`, and `tell` what happens, a failure included."""
    try:
        with load_engine(spec, tell) as (engine, info):
            on_built(engine)
            tell(Ready(info))
            engine.run(inbox)
    except LabError as error:
        tell(EngineFailed(str(error)))
    except Exception as error:
        logger.exception("the engine failed")
        tell(EngineFailed(f"{type(error).__name__}: {error}"))


def run_process(connection: Connection, spec: EngineSpec) -> None:
    """The main function of the spawned process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _kill_with_parent()
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
            os._exit(0)  # the API is gone

    def on_built(engine: EngineLoop) -> None:
        # What is loaded stays: no collection in the middle of a step looks at it again.
        gc.collect()
        gc.freeze()
        start_beating(tell, engine.busy_s)

    run_engine(spec, inbox, tell, on_built)


def _kill_with_parent() -> None:
    """A stopped process does not see that the pipe was closed; SIGKILL reaches it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _feed(connection: Connection, inbox: QueueInbox) -> None:
    """Move messages from the pipe to the inbox at once, so that sending them never waits for a step."""
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # the API is gone
        inbox.put(message)
        if isinstance(message, Stop):
            return
