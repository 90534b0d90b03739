"""`make dash` with the real Prometheus, and without one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.ops.servers import program
from tests.services.served import free_port, serving, until

pytestmark = pytest.mark.ops


def test_one_command_watches_a_service(tmp_path: Path) -> None:
    port = free_port()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "prometheus").symlink_to(program("prometheus"))
    without_docker = {**os.environ, "PATH": str(programs)}
    with serving() as served:
        command = [sys.executable, "-m", "tools.dash", f"--port={port}", f"--folder={tmp_path}"]
        process = subprocess.Popen([*command, f"--targets=127.0.0.1:{served.port}"], env=without_docker)

        def is_watched() -> bool:
            with contextlib.suppress(httpx.TransportError):
                query = f"http://127.0.0.1:{port}/api/v1/query"
                found = httpx.get(query, params={"query": "lab_ready"})
                return found.status_code == 200 and bool(found.json()["data"]["result"])
            return False

        try:
            until(is_watched, 60)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_without_prometheus_it_says_how_to_get_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.dash", f"--folder={tmp_path}"]
    done = subprocess.run(
        command, env={**os.environ, "PATH": "/nonexistent"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "apt-get install prometheus" in done.stderr
