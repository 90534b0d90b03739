"""One service of ours as a child process: started on a free port, waited for, and always stopped.

The child ends with the harness even when that is killed. Where it ends early, its own last log lines become
the error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapters.base import LabError
from harness.client.control import Control
from harness.replay.checkout import Checkout
from harness.replay.interrupts import on_interrupt

STOP_TIMEOUT_S = 30.0
POLL_S = 0.1
MAX_LOG_LINES = 12

Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ServiceLaunch:
    """What to start. `variant` None leaves the choice to the service's own settings.

    The service ignores what it does not know in `env`, but ends if it does not know one of `settings`.
    """

    variant: str | None
    env: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable, "-m", "tools.cli", "serve")
    source: Checkout | None = None
    """The commit whose code serves; None for this tree."""

    def argv(self, port: int) -> list[str]:
        chosen = ["--variant", self.variant] if self.variant else []
        for name, value in self.settings.items():
            chosen += ["--set", f"{name}={value}"]
        command = (self.source.python, *self.command[1:]) if self.source else self.command
        return [*command, *chosen, "--port", str(port)]


@dataclass(frozen=True, slots=True)
class RunningService:
    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def problem(self) -> str | None:
        """Why it ended; None while it runs."""
        if self.process.poll() is None:
            return None
        status, reason = self.process.returncode, _log_tail(self.log_path)
        return f"the service ended early (exit status {status}): {reason}; its log: {self.log_path}"

    def failure(self, what: str) -> LabError:
        """An error that says what happened and repeats the end of the service's log."""
        return LabError(f"{what}: {_log_tail(self.log_path)}\nits log: {self.log_path}")


@contextmanager
def running_service(
    launch: ServiceLaunch, *, start_timeout_s: float, announce: Announce
) -> Iterator[RunningService]:
    """Start a service, wait until it is ready, and stop it whatever happens.

    Raises:
        LabError: it ended or stayed unready; its log is repeated and kept.
    """
    port = _free_port()
    descriptor, log_name = tempfile.mkstemp(prefix="lab-service-", suffix=".log")
    log_path = Path(log_name)
    environment = {**os.environ, **launch.env, "HOST": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    environment |= launch.source.env if launch.source else {}
    told_to_stop: list[bool] = []
    # Python ignores an exception in what it calls at a fork, so an interrupt raised there would be lost.
    with os.fdopen(descriptor, "wb") as log, on_interrupt(lambda: told_to_stop.append(True)):
        process = subprocess.Popen(
            launch.argv(port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
        )
    service = RunningService(f"http://127.0.0.1:{port}", process, log_path)
    keep_log = True
    try:
        if told_to_stop:
            raise KeyboardInterrupt
        _wait_until_ready(service, start_timeout_s, announce)
        yield service
        keep_log = service.problem() is not None
    except KeyboardInterrupt:
        keep_log = False
        raise
    finally:
        try:
            _stop(process)
        finally:
            if not keep_log:
                log_path.unlink(missing_ok=True)


def _wait_until_ready(service: RunningService, timeout_s: float, announce: Announce) -> None:
    started_s = time.monotonic()
    with Control(service.url) as control:
        while True:
            if (problem := service.problem()) is not None:
                raise LabError(problem)
            health = control.health()
            if health is not None and health.status == "ok":
                return
            if health is not None and health.status == "failed":
                raise service.failure("the service could not start its engine")
            waited_s = time.monotonic() - started_s
            if waited_s > timeout_s:
                raise service.failure(f"the service was not ready after {timeout_s:g} s (START_TIMEOUT_S)")
            announce(f"starting the service, {waited_s:.0f} s")
            time.sleep(POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL for it and all it started; an interrupt meanwhile brings the SIGKILL at once."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
    finally:
        # It leads a session of its own: what it left behind is in its process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _log_tail(log_path: Path) -> str:
    """The last error that was logged, else the last lines."""
    text = log_path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        for mark in (" ERROR ", "lab serve: "):
            if mark in line:
                return line.partition(mark)[2]
    return "\n".join(lines[-MAX_LOG_LINES:]) or "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end_with_parent() -> Callable[[], None]:
    """For the child, before it becomes the service: SIGTERM when the harness is gone, however it went."""
    pr_set_pdeathsig = 1
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    harness = os.getpid()

    def act() -> None:
        prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != harness:  # it was gone before it could be watched
            os._exit(1)

    return act
