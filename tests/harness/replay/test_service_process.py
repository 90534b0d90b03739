"""A service that is started is waited for, listened to when it fails, and always stopped."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapters.base import LabError
from harness.replay.interrupts import on_interrupt, raise_interrupt
from harness.replay.service_process import ServiceLaunch, running_service

REPOSITORY = Path(__file__).resolve().parents[3]
FAKE_SERVICE = """
import http.server, json, os, subprocess, sys
if os.environ.get("HELPER"):
    # Something that outlives its parent unless the whole group is ended.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(os.environ["HELPER"], "w").write(str(child.pid))
state = {"status": os.environ["STATUS"], "active_requests": 0, "queue_depth": 0, "worker": "running"}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(state).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
print(sys.argv[1:], os.environ["HOST"], file=sys.stderr)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
FAILING = "import sys; print('lab serve: MODEL=x cannot be had', file=sys.stderr); sys.exit(2)"


def launch(code: str, **env: str) -> ServiceLaunch:
    return ServiceLaunch("static", env, {"MAX_BATCH": "8"}, command=(sys.executable, "-c", code))


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def is_soon_gone(process: psutil.Process) -> bool:
    """A killed process may take a moment to go."""
    with contextlib.suppress(psutil.NoSuchProcess):
        end_s = time.monotonic() + 10
        while is_running(process) and time.monotonic() < end_s:
            time.sleep(0.01)
        return not is_running(process)
    return True


def test_a_ready_service_is_used_and_stopped_with_all_it_started(tmp_path: Path) -> None:
    helper = tmp_path / "helper"
    announced: list[str] = []
    start = launch(FAKE_SERVICE, STATUS="ok", HELPER=str(helper))
    with running_service(start, start_timeout_s=30, announce=announced.append) as service:
        processes = [psutil.Process(service.process.pid), psutil.Process(int(helper.read_text()))]
        assert all(is_running(process) for process in processes)
        assert service.problem() is None
        log = service.log_path.read_text()
        assert "'--variant', 'static', '--set', 'MAX_BATCH=8', '--port'" in log
        assert "127.0.0.1" in log
    assert all(is_soon_gone(process) for process in processes)
    assert not service.log_path.exists()


def test_it_is_stopped_when_the_measurement_fails() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        running_service(
            launch(FAKE_SERVICE, STATUS="ok"), start_timeout_s=30, announce=lambda _: None
        ) as service,
    ):
        _ = 1 / 0
    assert not psutil.pid_exists(service.process.pid)


def test_the_sentence_of_a_service_that_ends_is_passed_on() -> None:
    with (
        pytest.raises(LabError, match=r"exit status 2.*MODEL=x cannot be had; its log: ") as caught,
        running_service(launch(FAILING), start_timeout_s=30, announce=lambda _: None),
    ):
        pass
    Path(str(caught.value).rpartition("its log: ")[2]).unlink()


@pytest.mark.parametrize(
    ("status", "timeout_s", "message"),
    [("failed", 30.0, "could not start its engine"), ("starting", 0.5, "not ready after 0.5 s")],
)
def test_a_service_that_never_gets_ready(status: str, timeout_s: float, message: str) -> None:
    with (
        pytest.raises(LabError, match=message) as caught,
        running_service(
            launch(FAKE_SERVICE, STATUS=status), start_timeout_s=timeout_s, announce=lambda _: None
        ),
    ):
        pass
    Path(str(caught.value).rpartition("its log: ")[2]).unlink()


def test_a_service_that_dies_under_measurement_shows() -> None:
    with running_service(
        launch(FAKE_SERVICE, STATUS="ok"), start_timeout_s=30, announce=lambda _: None
    ) as service:
        service.process.kill()
        service.process.wait()
        assert "the service ended early (exit status -9)" in (service.problem() or "")
    assert service.log_path.exists()
    service.log_path.unlink()


def test_an_interrupt_while_it_is_stopped_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def told_to_stop() -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        running_service(
            launch(FAKE_SERVICE, STATUS="ok"), start_timeout_s=30, announce=lambda _: None
        ) as service,
    ):
        monkeypatch.setattr(service.process, "terminate", told_to_stop)
    assert service.process.returncode == -signal.SIGKILL
    assert not service.log_path.exists()


def test_an_interrupt_while_it_is_started_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen

    def told_to_stop(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(begin(*words, **options))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", told_to_stop)
    with (
        pytest.raises(KeyboardInterrupt),
        on_interrupt(raise_interrupt),
        running_service(launch(FAKE_SERVICE, STATUS="ok"), start_timeout_s=30, announce=lambda _: None),
    ):
        pytest.fail("the service was used")
    assert started[0].returncode is not None


ORPHAN = """
import os, sys, time
from harness.replay.service_process import _end_with_parent
parent = os.getpid()
act = _end_with_parent()
if not os.fork():
    while os.getppid() == parent:
        time.sleep(0.01)
    act()
    open(sys.argv[1], "w").close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tells the kernel of Linux")
def test_a_harness_that_is_killed_before_it_is_watched_leaves_no_service(tmp_path: Path) -> None:
    """The pipe closes when both processes have ended."""
    words = [sys.executable, "-c", ORPHAN, str(tmp_path / "lives")]
    done = subprocess.run(words, capture_output=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "lives").exists()
