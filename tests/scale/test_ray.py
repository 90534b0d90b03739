"""Replicas on a Ray cluster of two nodes: two raylets on this machine, each with two CPUs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pandas as pd
import psutil
import pytest
import yaml

from harness.results.manifest import RunManifest
from harness.results.record import read_parquet
from services.read_settings import read_settings
from tests.harness.commands.test_bench import _plain_environment, only_result  # noqa: F401
from tests.ops.servers import ROOT
from tests.services.served import free_port, lab_serve, until
from tools.cli import main

# Read as Ray is imported, and by all that it starts: time to start in on two busy cores, and no worker
# before there is work for it.
os.environ.update(
    RAY_raylet_start_wait_time_s="120",
    RAY_agent_register_timeout_ms="120000",
    RAY_worker_register_timeout_seconds="120",
    RAY_enable_worker_prestart="0",
    RAY_prestart_worker_first_driver="0",
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",
    RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="60",
    RAY_USAGE_STATS_ENABLED="0",
)
ray = pytest.importorskip("ray", reason="Ray is missing: the extra scale brings it, where it has wheels")
serve = pytest.importorskip("ray.serve")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [pytest.mark.scale, pytest.mark.timeout(300)]

START_S = 120.0
NODE = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_log_monitor": False}
SETTINGS = {"NULL_STEP_MS": 100, "MAX_BATCH": 8, "N_THREADS": 1, "LOG_LEVEL": "WARNING"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    made.add_node(**NODE)
    ray.init(made.address, log_to_driver=False)
    yield made
    started = psutil.Process().children(recursive=True)
    ray.shutdown()
    made.shutdown()
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left


@pytest.fixture(scope="module")
def url(cluster: Any) -> Iterator[str]:
    """The service, from 1 to 3 replicas of it."""
    port = free_port()
    command = [sys.executable, "-m", "tools.cli", "serve-ray", "--address", cluster.address]
    command += ["--backend=null", f"--port={port}", "--replicas=1:3", "--downscale-delay-s=2"]
    command += [f"--set={name}={value}" for name, value in SETTINGS.items()]
    process = subprocess.Popen(command, cwd=ROOT)
    found = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or is_ready(found), START_S)
        assert process.poll() is None
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0
        assert num_running() == 0, "the application is gone, the cluster stays"
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    time.sleep(0.1)
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url + "/health").status_code == 200
    return False


def num_running() -> int:
    """Replicas that take requests. Asked too often, Serve's controller has no time for anything else."""
    time.sleep(0.1)
    application = serve.status().applications.get("lab")
    deployment = application and application.deployments.get("lab")
    return int(deployment.replica_states.get("RUNNING", 0)) if deployment else 0


def bench(url: str, out: Path, *options: str) -> pd.DataFrame:
    main(["bench", "--url", url, "--out", str(out), "--salt", "0", "--warmup", "0", *options])
    return only_result(out)[2].set_index("schedule_index").sort_index()


def test_from_one_replica_to_three_and_back_without_a_loss(url: str, tmp_path: Path) -> None:
    assert num_running() == 1
    seen: set[int] = set()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            seen.add(num_running())

    watching = threading.Thread(target=watch)
    watching.start()
    rows = bench(url, tmp_path / "up", "--requests", "1200", "--concurrency", "32")
    is_over.set()
    watching.join()
    assert max(seen) == 3, seen
    # Fewer users, while two of the replicas drain and go.
    ends_s = time.monotonic() + 90
    fewer = []
    while num_running() > 1:
        assert time.monotonic() < ends_s
        fewer.append(bench(url, tmp_path / f"down{len(fewer)}", "--requests", "20", "--concurrency", "2"))
    assert rows["error"].isna().all(), rows["error"].dropna().unique()
    assert pd.concat(fewer)["error"].isna().all()

    with lab_serve(**SETTINGS) as alone:
        alone.wait_ready()
        one = bench(alone.url, tmp_path / "alone", "--requests", "40", "--concurrency", "8")
    assert rows.loc[:39, "output_sha256"].equals(one["output_sha256"])


def busy_replicas(url: str) -> list[str]:
    """Those whose batch has rows at this moment: killing another one costs nobody an answer."""
    time.sleep(0.3)
    busy = []
    for target in httpx.get(url + "/replicas").json():
        (address,) = target["targets"]
        with contextlib.suppress(httpx.TransportError):  # one that is leaving
            page = httpx.get(f"http://{address}/metrics").text
            if re.search(r"^lab_running_sequences\S* [1-9]", page, re.MULTILINE):
                busy.append(target["labels"]["replica"])
    return busy


def test_a_killed_replica_ends_its_requests_in_errors_and_no_others(url: str, tmp_path: Path) -> None:
    busy: list[str] = []

    def are_two() -> bool:
        busy[:] = busy_replicas(url)
        return len(busy) > 1

    def kill_one() -> None:
        until(are_two, START_S)
        named = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        replicas = [name for name in named if name.startswith("SERVE_REPLICA::lab#")]
        victim = next(name for name in replicas if name.endswith(busy[-1]))
        ray.kill(ray.get_actor(victim, namespace="serve"))

    killing = threading.Thread(target=kill_one)
    killing.start()
    rows = bench(url, tmp_path / "killed", "--requests", "1200", "--concurrency", "32")
    killing.join()
    errors = rows["error"].dropna()
    print(f"{len(errors)} of {len(rows)}: {errors.value_counts().to_dict()}")
    assert 0 < len(errors) <= 32
    assert len(rows) == 1200
    assert (rows["error"].isna() | (rows["finish_reason"] != "length")).all()


def test_each_replica_has_metrics_of_its_own(url: str) -> None:
    listed = httpx.get(url + "/replicas").json()
    assert listed
    for target in listed:
        assert target["labels"]["replica"]
        (address,) = target["targets"]
        page = httpx.get(f"http://{address}/metrics").text
        assert "lab_ready{" in page


def test_shards_as_tasks_are_the_whole_run(
    url: str, cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--url", url, "--requests", "40", "--concurrency", "4", "--warmup", "0", "--salt", "0"]
    out = tmp_path / "tasks"
    command = [sys.executable, "-m", "tools.cli", "bench-ray", "--address", cluster.address, *words]
    made = subprocess.run(
        [*command, "--tasks=2", "--lead-s=25", f"--out={out}"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (merged,) = out.rglob("merged.parquet")
    manifest, rows = read_parquet(merged)
    assert isinstance(manifest, RunManifest)
    assert len(manifest.merged_from) == 2
    assert sorted(rows["schedule_index"]) == list(range(40))
    assert rows["error"].isna().all()


def test_requests_go_where_the_fewest_tokens_are_left() -> None:
    from tools.ray_serve.router import OutstandingTokensRouter

    router = OutstandingTokensRouter.__new__(OutstandingTokensRouter)
    router.initialize_state()
    reports = {"a": (300, 1), "b": (100, 3), "c": (80, 1)}
    replicas = [
        SimpleNamespace(
            replica_id=name, routing_stats={"report": 7, "outstanding_tokens": tokens, "num_requests": num}
        )
        for name, (tokens, num) in reports.items()
    ]

    def best() -> str:
        ranked = asyncio.run(router.choose_replicas(replicas, object()))
        assert all(len(rank) == 1 for rank in ranked)
        return str(ranked[0][0].replica_id)

    # A mean request has 96 tokens: c 80, b 100, c 176, b 196, c 272, b 292, a 300.
    assert [best() for _ in range(7)] == list("cbcbcba")
    replicas[2].routing_stats = {"report": 8, "outstanding_tokens": 90, "num_requests": 4}
    assert best() == "c", "a new report holds what was sent before it"


def test_serve_yaml_describes_the_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    from tools.ray_serve import replica

    written = yaml.safe_load((ROOT / "docker/ray/serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(written).applications
    module, _, name = application.import_path.partition(":")
    assert (module, name) == (replica.__name__, replica.app.__name__)
    made = replica.app(application.args)
    (named,) = application.deployments
    assert application.name == named.name == made._bound_deployment.name
    settings = read_settings(application.args, env_file=None)
    scaling = named.autoscaling_config
    assert scaling["target_ongoing_requests"] == replica.target_ongoing_requests(settings)
    assert named.ray_actor_options.num_cpus == settings.num_threads


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["serve-ray", "--port=0"], "PORT is 0"),
        (["serve-ray", "--address=127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
        (["bench-ray", "--tasks=2"], "URL is missing"),
        (["simulate-ray"], "takes --brief alone"),
    ],
)
def test_what_cannot_be_is_one_sentence(words: list[str], sentence: str) -> None:
    command = [sys.executable, "-m", "tools.cli", *words]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2
    assert sentence in made.stderr
    assert "Traceback" not in made.stderr


def test_a_simulation_as_tasks_says_what_it_says_in_one_process(cluster: Any) -> None:
    options = ["--brief", "--variants", "static", "continuous", "--seeds", "2", "--sweep", "rate=2,8"]

    def table(*command: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "tools.cli", *command, *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "MAX_BATCH": "4"},  # of the command alone: the cluster's nodes have none
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("events/s") == 8
        return [line for line in done.stdout.splitlines() if line.startswith("|")]

    lines = table("simulate")
    assert len(lines) == 6
    assert table("simulate-ray", "--address", cluster.address) == lines
