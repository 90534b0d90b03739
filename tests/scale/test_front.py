"""The front of the compose stack, docker/front, with a real nginx before three services on this machine.

The services have loopback addresses of their own and one port, as containers have. In the place of `getent`,
which asks Docker's names, stands a script that prints the addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pandas as pd
import pytest

from harness.client.answer import Answer
from harness.client.connection import Origin
from harness.client.stream import StreamClient
from harness.client.target import Target
from harness.plan.schedule import PlannedRequest
from tests.harness.commands.test_bench import _plain_environment, only_result  # noqa: F401
from tests.ops.servers import ROOT, running
from tests.services.served import free_port, until
from tools.cli import main

pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is missing: apt-get install nginx-light"),
]

HOSTS = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
START_S = 60.0
MAX_ADDED_TTFT_MS = 3.0


@dataclass
class Replica:
    url: str
    process: subprocess.Popen[bytes]

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + "/health").status_code == 200
        return False


@dataclass
class Fleet:
    front: str
    replicas: list[Replica]
    upstream: Path

    def is_known(self, replica: Replica) -> bool:
        """Whether the front sends it requests."""
        return f"server {replica.url.removeprefix('http://')} " in self.upstream.read_text()


def start(host: str, port: int) -> Replica:
    settings = ["--set=NULL_STEP_MS=10", "--set=LOG_LEVEL=ERROR"]
    command = [
        sys.executable,
        "-m",
        "tools.cli",
        "serve",
        "--backend=null",
        f"--host={host}",
        f"--port={port}",
    ]
    return Replica(f"http://{host}:{port}", subprocess.Popen([*command, *settings], cwd=ROOT))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("front")
    names = folder / "getent"
    names.write_text("#!/bin/sh\n" + "".join(f"echo '{host} STREAM {host}'\n" for host in HOSTS))
    names.chmod(0o755)
    port, backend_port = free_port(), free_port()
    replicas = [start(host, backend_port) for host in HOSTS]
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FRONT_DIR": str(folder / "nginx"),
        "BACKEND_PORT": str(backend_port),
        "LISTEN": f"127.0.0.1:{port}",
        "INTERVAL_S": "0.5",
        "BACKENDS": "continuous",
        "ARM_A": "continuous",
        "ARM_B": "continuous",
        "SHARE_A": "50",
    }
    front = f"http://127.0.0.1:{port}"
    made = Fleet(front, replicas, folder / "nginx/upstreams/continuous.conf")
    try:
        for replica in replicas:
            until(replica.is_ready, START_S)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            front_script = ["/bin/sh", str(ROOT / "docker/front/front.sh")]
            with running(front_script, f"{front}/front", folder):
                until(lambda: all(made.is_known(replica) for replica in replicas), START_S)
                yield made
    finally:
        for replica in replicas:
            replica.process.kill()
            replica.process.wait()


def bench(url: str, out: Path, *options: str) -> pd.DataFrame:
    """The rows of a run; whether a busy machine sent them in time is not the question."""
    main(["bench", "--url", url, "--out", str(out), "--salt", "0", *options])
    return only_result(out)[2].set_index("schedule_index").sort_index()


def test_the_same_tokens_as_one_service(fleet: Fleet, tmp_path: Path) -> None:
    options = ["--requests", "80", "--concurrency", "12"]
    through = bench(fleet.front, tmp_path / "front", *options)
    alone = bench(fleet.replicas[0].url, tmp_path / "alone", *options)
    assert through["error"].isna().all()
    assert through["num_output_tokens"].sum() == alone["num_output_tokens"].sum() > 0
    assert through["output_sha256"].equals(alone["output_sha256"])


def test_a_token_leaves_the_front_as_it_comes(fleet: Fleet) -> None:
    """Each request goes out twice, through the front and directly, in turns."""
    num_tokens = 8

    async def answer(client: StreamClient, index: int) -> Answer:
        planned = PlannedRequest(index, f"p{index}", f"Say {index}.", num_tokens, seed=1)
        found = Answer(planned, 0.0)
        await client.send([found], index)
        assert found.error is None
        # On a busy machine two tokens may leave in one frame; a front that buffers sends all in one.
        assert len(found.chunk_s) >= num_tokens // 2
        return found

    async def in_turns(num: int) -> list[float]:
        clients = []
        for url in (fleet.front, fleet.replicas[0].url):
            host, _, port = url.removeprefix("http://").partition(":")
            clients.append(StreamClient(Target(Origin(host, int(port)), "/generate")))
        added_ms = []
        for index in range(num):
            through, direct = [await answer(client, index) for client in clients]
            assert through.sent_s is not None
            assert direct.sent_s is not None
            added_ms.append(1000 * (through.chunk_s[0] - through.sent_s - direct.chunk_s[0] + direct.sent_s))
        for client in clients:
            client.close()
        return added_ms

    added_ms = asyncio.run(in_turns(60))
    print(f"TTFT through the front: {statistics.median(added_ms):+.2f} ms (median of {len(added_ms)} pairs)")
    assert statistics.median(added_ms) <= MAX_ADDED_TTFT_MS


def test_a_rolling_restart_under_load_loses_nothing(fleet: Fleet, tmp_path: Path) -> None:
    problems: list[BaseException] = []

    def roll() -> None:
        try:
            for index, old in enumerate(fleet.replicas):
                old.process.send_signal(signal.SIGTERM)
                assert old.process.wait(START_S) == 0, "it cut off what it had accepted"
                until(lambda old=old: not fleet.is_known(old), START_S)  # type: ignore[misc]
                host, _, port = old.url.removeprefix("http://").partition(":")
                new = fleet.replicas[index] = start(host, int(port))
                until(new.is_ready, START_S)
                until(lambda new=new: fleet.is_known(new), START_S)  # type: ignore[misc]
        except BaseException as problem:
            problems.append(problem)

    rolling = threading.Thread(target=roll)
    rolling.start()
    rows = bench(fleet.front, tmp_path / "rolling", "--requests", "1000", "--rate", "25", "--warmup", "0")
    was_over = not rolling.is_alive()
    rolling.join()
    assert problems == []
    assert was_over, "the load ended before the restart did"
    assert len(rows) == 1000
    assert rows["error"].isna().all(), rows["error"].dropna().unique()
