"""Real replicas of the null backend behind the project's nginx front, against simulated ones.

The same schedule goes to both. The simulation knows the machine from one run against a single service, made
first; the null backend's time is a formula, so what is checked is the router, the queues and the overheads.
nginx runs with one worker here: each worker counts connections by itself, which the simulated router does
not. Exit status: 1 where a TTFT p50 or p95 is off by more than is allowed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from adapters.base import ConfigError
from harness.plan.planner import plan
from harness.replay.service_process import ServiceLaunch, running_service
from harness.results.manifest import RunManifest
from harness.results.metrics import TPOT, TTFT, Figure
from harness.results.record import ReplayLabels, make_table, read_parquet, to_frame
from harness.results.steps import STEPS_SUFFIX
from harness.results.table import render_table
from harness.settings import HarnessSettings
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.measured import calibrate
from harness.simulator.simulation import make_rows, read_arm, simulate

FRONT = Path(__file__).parents[1] / "docker/front/nginx.conf.in"
ALLOWED = 0.15
ROUTERS = {"least_outstanding": "least_conn;", "round_robin": ""}
"""By name of the simulator, what nginx is told."""
STEP = {"BACKEND": "null", "NULL_STEP_MS": "20", "NULL_ROW_MS": "1", "NULL_PROMPT_TOKEN_MS": "0.1"}


@contextmanager
def front(urls: list[str], method: str, port: int) -> Iterator[str]:
    """nginx in front of these services, configured as docker/front does it."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise ConfigError("there is no nginx: apt-get install nginx-light")
    with tempfile.TemporaryDirectory(prefix="lab-front-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # its worker is another user
        (folder / "upstreams").mkdir()
        servers = "".join(f"server {url.removeprefix('http://')};\n" for url in urls)
        (folder / "upstreams/continuous.conf").write_text(
            f"upstream continuous {{\n{method}\n{servers}keepalive 256;\n}}\n"
        )
        text = FRONT.read_text().replace("worker_processes auto", "worker_processes 1")
        for key, value in {
            "ARM_A": "continuous", "ARM_B": "continuous", "SHARE_A": "50", "BACKENDS": "continuous",
            "DIR": str(folder), "LISTEN": f"127.0.0.1:{port}",
        }.items():  # fmt: skip
            text = text.replace(f"@{key}@", value)
        (folder / "nginx.conf").write_text(text)
        process = subprocess.Popen([program, "-c", str(folder / "nginx.conf"), "-g", "daemon off;"])
        try:
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:
                client.get(f"{url}/front").raise_for_status()
            yield url
        finally:
            process.terminate()
            process.wait(10)


def bench(out: Path, *options: str) -> Path:
    """The rows that `lab bench` wrote."""
    command = [sys.executable, "-m", "tools.cli", "bench", "--out", str(out), "--warmup", "6", *options]
    subprocess.run(command, check=True, env=os.environ | STEP, stdout=subprocess.DEVNULL)
    return next(path for path in out.rglob("*.parquet") if not path.name.endswith(STEPS_SUFFIX))


def check(args: argparse.Namespace) -> int:
    lines, is_off = [], False
    with tempfile.TemporaryDirectory(prefix="lab-check-") as name, ExitStack() as stack:
        os.environ.update(STEP)
        alone = bench(
            Path(name) / "alone", "--variant", "continuous", "--requests", "150", "--concurrency", "8"
        )
        calibration = calibrate(alone, allow_busy=args.allow_busy)
        launch = ServiceLaunch("continuous", STEP)
        urls = [
            stack.enter_context(running_service(launch, start_timeout_s=60, announce=lambda text: None)).url
            for _ in range(args.replicas)
        ]
        for router, method in ROUTERS.items():
            load = {"rate": args.rate, "requests": args.requests, "seed": args.seed}
            options = [word for key, value in load.items() for word in (f"--{key}", str(value))]
            with front(urls, method, args.port) as url:
                path = bench(Path(name) / router, "--url", url, *options)
            manifest, rows = read_parquet(path)
            assert isinstance(manifest, RunManifest)
            _, schedule = plan(HarnessSettings(**load), allow_changed_corpus=False)
            made = simulate(
                read_arm("continuous", {}, calibration),
                calibration,
                schedule,
                FleetOptions(args.replicas, router),
            )
            labels = ReplayLabels("simulated", "continuous", "continuous", "null", "null", 0)
            said = to_frame(make_table(make_rows(labels, made.flights)))
            cells = [router, f"{manifest.repeats[0].machine.other_cpu_share or 0:.0%}"]
            for figure in (Figure(TTFT, 50), Figure(TTFT, 95), Figure(TPOT, 50)):
                real, simulated = figure.value(rows, True), figure.value(said, True)
                assert real is not None
                assert simulated is not None
                error = simulated / real - 1
                is_off |= figure.metric is TTFT and abs(error) > ALLOWED
                cells.append(f"{real:.1f} -> {simulated:.1f} ({error:+.1%})")
            lines.append(cells)
    headers = ["router", "others' CPU", "TTFT p50 (ms)", "TTFT p95 (ms)", "TPOT p50 (ms)"]
    print(f"{args.replicas} replicas, {args.requests} requests at {args.rate:g}/s, measured -> simulated\n")
    print(render_table(headers, lines))
    return int(is_off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--rate", type=float, default=9.0)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--allow-busy", action="store_true", help="go on where others use the CPU")
    sys.exit(check(parser.parse_args()))


if __name__ == "__main__":
    main()
