"""`make dash` with the real Prometheus, and without one."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
import pytest

from harness.history import store
from tests.ops.servers import program
from tests.ops.test_panels import REAL_NIGHTS
from tests.services.served import free_port, serving, until

pytestmark = pytest.mark.ops


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Into an empty folder, as a fresh clone is."""
    options = {"port": free_port(), "results-port": free_port(), "folder": tmp_path / "prometheus"}
    options |= {"results": tmp_path / "results", "history": tmp_path / "history"}
    return [sys.executable, "-m", "tools.dash", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture
def without_docker(tmp_path: Path) -> dict[str, str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("prometheus", "promtool"):
        (programs / name).symlink_to(program(name))
    return {**os.environ, "PATH": str(programs)}


@contextlib.contextmanager
def dash(words: list[str], env: dict[str, str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(words, env=env, **more)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def option(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


def has_answer(words: list[str], query: str) -> Callable[[], bool]:
    def ask() -> bool:
        with contextlib.suppress(httpx.TransportError):
            url = f"http://127.0.0.1:{option(words, 'port')}/api/v1/query"
            found = httpx.get(url, params={"query": query})
            return found.status_code == 200 and bool(found.json()["data"]["result"])
        return False

    return ask


def has_results(words: list[str]) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{option(words, 'results-port')}/").status_code == 200
    return False


def test_one_command_watches_a_service(command: list[str], without_docker: dict[str, str]) -> None:
    with serving() as served, dash([*command, f"--targets=127.0.0.1:{served.port}"], without_docker):
        until(has_answer(command, "lab_ready"), 60)
        until(lambda: has_results(command), 60)


def test_it_listens_on_this_machine_alone_and_sigterm_ends_all(
    command: list[str], without_docker: dict[str, str]
) -> None:
    with dash(command, without_docker) as process:
        until(lambda: has_results(command) and has_answer(command, "vector(1)")(), 60)
        children = psutil.Process(process.pid).children(recursive=True)
        hosts = {c.laddr.ip for p in children for c in p.net_connections() if c.status == "LISTEN"}
        assert hosts == {"127.0.0.1"}
        process.terminate()
        assert process.wait(30) == 0
        assert not any(child.is_running() for child in children)


def test_the_history_is_imported_once(command: list[str], without_docker: dict[str, str]) -> None:
    folder = Path(option(command, "history"))
    folder.symlink_to(REAL_NIGHTS)
    age = (
        int((pd.Timestamp.now(tz="UTC") - store.read(folder).rows["started_at"].min()).total_seconds()) + 3600
    )
    data = Path(option(command, "folder")) / "data"
    blocks = []
    for _ in range(2):
        with dash(command, without_docker):
            until(has_answer(command, f"last_over_time(lab_comparison_ratio_high[{age}s])"), 60)
        blocks.append(len(list(data.glob("*/meta.json"))))
    assert blocks[0] == blocks[1] > 0


@pytest.mark.parametrize("no_browser", [False, True])
def test_the_results_page_opens_in_the_browser_of_a_person(
    command: list[str], without_docker: dict[str, str], tmp_path: Path, no_browser: bool
) -> None:
    """A terminal is faked, and a browser that writes down what it is given."""
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    env = {**without_docker, "DISPLAY": ":0", "BROWSER": f"{browser} %s"}
    ours, theirs = pty.openpty()
    words = [*command, "--no-browser"] if no_browser else command
    with dash(words, env, stdout=theirs):
        until(lambda: has_results(command), 60)
        if not no_browser:
            until(opened.exists, 20)
    assert opened.exists() != no_browser
    assert no_browser or opened.read_text().strip().endswith(f":{option(command, 'results-port')}/")
    os.close(ours)
    os.close(theirs)


def test_without_prometheus_it_says_how_to_get_it(command: list[str]) -> None:
    done = subprocess.run(
        command, env={**os.environ, "PATH": "/nonexistent"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "apt-get install prometheus" in done.stderr
