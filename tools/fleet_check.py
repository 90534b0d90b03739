"""Real services of the null backend against simulated ones: replicas behind the project's nginx front or,
with `--alone`, single services of every strategy under closed loops, open loops and a trace of bursts.

The same schedule goes to both. The simulation knows the machine from one run against a single service, made
first; the null backend's time is a formula, so what is checked is the router, the queues and the overheads.
nginx runs with one worker here: each worker counts connections by itself, which the simulated router does
not. In the run with an autoscaler all services are up, but the front knows the first one alone; from the
services' own metrics the formula says how many there should be, and the front is told of each some seconds
later, as of one that has to start. Exit status: 1 where a figure is off by more than is allowed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Event, Thread

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
from harness.simulator.operations import Autoscaler, Autoscaling
from harness.simulator.simulation import make_rows, read_arm, simulate
from harness.simulator.verified import render_verified
from harness.simulator.verify import verify_all
from services.strategies import VARIANTS

FRONT = Path(__file__).parents[1] / "docker/front/nginx.conf.in"
ALLOWED = 0.15
AUTOSCALING = Autoscaling(target=8, most=3, every_s=0.25, start_up_s=3)
"""It looks often: nobody knows how its looks lie to the first request."""
ROUTERS = {"least_outstanding": "least_conn;", "round_robin": ""}
"""By name of the simulator, what nginx is told."""
STEP = {"BACKEND": "null", "NULL_STEP_MS": "20", "NULL_ROW_MS": "1", "NULL_PROMPT_TOKEN_MS": "0.1"}


@dataclass(frozen=True, slots=True)
class Front:
    url: str
    process: subprocess.Popen[bytes]
    folder: Path
    method: str

    def send_to(self, urls: list[str]) -> None:
        """From the next connection on; what was begun before goes on where it is."""
        self.write_upstream(self.folder, self.method, urls)
        self.process.send_signal(signal.SIGHUP)

    @staticmethod
    def write_upstream(folder: Path, method: str, urls: list[str]) -> None:
        servers = "".join(f"server {url.removeprefix('http://')};\n" for url in urls)
        (folder / "upstreams/continuous.conf").write_text(
            f"upstream continuous {{\n{method}\n{servers}keepalive 256;\n}}\n"
        )


@contextmanager
def front(urls: list[str], method: str, port: int) -> Iterator[Front]:
    """nginx in front of these services, configured as docker/front does it."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise ConfigError("there is no nginx: apt-get install nginx-light")
    with tempfile.TemporaryDirectory(prefix="lab-front-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # its worker is another user
        (folder / "upstreams").mkdir()
        Front.write_upstream(folder, method, urls)
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
            yield Front(url, process, folder, method)
        finally:
            process.terminate()
            process.wait(10)


def _num_sequences(url: str) -> int:
    """Running and waiting."""
    page = httpx.get(f"{url}/metrics").text
    return sum(int(float(n)) for n in re.findall(r"^lab_(?:running|waiting)_sequences\S* (\S+)", page, re.M))


@contextmanager
def autoscaled(front: Front, urls: list[str], policy: Autoscaling) -> Iterator[None]:
    """As many of `urls` behind the front as the policy wants, the first one alone at first."""
    scaler, is_over, ready_s, num_told = Autoscaler(policy), Event(), list[float](), 0

    def scale() -> None:
        nonlocal num_told
        next_s = time.monotonic() + policy.every_s
        while not is_over.wait(0.01):
            now_s = time.monotonic()
            if num_told < len(ready_s) and ready_s[num_told] <= now_s:
                num_told += 1
                front.send_to(urls[: 1 + num_told])
            if now_s >= next_s:
                num_now = 1 + len(ready_s)
                num_sequences = sum(map(_num_sequences, urls[:num_now]))
                wanted = scaler.num_replicas(now_s, num_sequences, num_now)
                ready_s.extend([now_s + policy.start_up_s] * (wanted - num_now))
                next_s += policy.every_s

    thread = Thread(target=scale)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def rows_in(out: Path) -> list[Path]:
    """The results of a folder, without step logs."""
    return [path for path in out.rglob("*.parquet") if not path.name.endswith(STEPS_SUFFIX)]


def bench(out: Path, *options: str) -> Path:
    """The rows that `lab bench` wrote."""
    command = [sys.executable, "-m", "tools.cli", "bench", "--out", str(out), "--warmup", "6", *options]
    subprocess.run(command, check=True, env=os.environ | STEP, stdout=subprocess.DEVNULL)
    return rows_in(out)[0]


def write_bursts(path: Path, num_requests: int) -> None:
    """A trace of bursts, of prompts and answers that are mostly short and at times very long."""
    draw, at_s = Random(0), 0.0
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for number in range(num_requests):
        at_s += draw.expovariate(20) if number % 8 else 2.0
        prompt, answer = (min(600, int(scale * draw.paretovariate(1.1))) for scale in (20, 10))
        lines.append(f"2026-01-01 00:{int(at_s // 60):02}:{at_s % 60:09.6f},{prompt},{answer}")
    path.write_text("\n".join(lines) + "\n")


def check_alone(args: argparse.Namespace, out: Path) -> int:
    """Runs that `out` has are not made again."""

    def once(name: str, variant: str, *options: str) -> Path:
        known = rows_in(out / name)
        return known[0] if known else bench(out / name, "--variant", variant, *options)

    out.mkdir(parents=True, exist_ok=True)
    write_bursts(out / "bursts.csv", args.requests)
    calibrated = once("calibration", "continuous", "--requests", "150", "--concurrency", "8")
    calibration = calibrate(calibrated, allow_busy=args.allow_busy)
    loads = [
        *(("--concurrency", users) for users in ("3", "6", "20")),
        *(("--rate", rate) for rate in ("1", "3", "6")),
        ("--trace", str(out / "bursts.csv")),
    ]
    asked = ("--requests", str(args.requests), "--seed", str(args.seed))
    paths = [
        once(f"{variant}-{number}", variant, *load, *asked)
        for variant in args.variants
        for number, load in enumerate(loads)
    ]
    runs = verify_all(paths, calibration)
    print(f"{calibration.in_words()}\n\n{render_verified(runs)}")
    return int(any(run.is_off for run in runs))


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
        runs = [*((router, None) for router in ROUTERS), ("round_robin", AUTOSCALING)]
        for router, policy in runs:
            load = {"rate": args.rate, "requests": args.requests, "seed": args.seed}
            options = [word for key, value in load.items() for word in (f"--{key}", str(value))]
            what = f"{router}, 1 to {policy.most}" if policy else router
            with ExitStack() as fronted:
                at = fronted.enter_context(front(urls[:1] if policy else urls, ROUTERS[router], args.port))
                if policy:
                    fronted.enter_context(autoscaled(at, urls, policy))
                path = bench(Path(name) / what, "--url", at.url, *options)
            manifest, rows = read_parquet(path)
            assert isinstance(manifest, RunManifest)
            _, schedule = plan(HarnessSettings(**load), allow_changed_corpus=False)
            made = simulate(
                read_arm("continuous", {}, calibration),
                calibration,
                schedule,
                FleetOptions(1 if policy else args.replicas, router, autoscaling=policy),
            )
            labels = ReplayLabels("simulated", "continuous", "continuous", "null", "null", 0)
            said = to_frame(make_table(make_rows(labels, made.flights)))
            cells = [what, f"{manifest.repeats[0].machine.other_cpu_share or 0:.0%}"]
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
    parser.add_argument("--requests", type=int, help="of each run (default 300; 32 with --alone)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--allow-busy", action="store_true", help="go on where others use the CPU")
    parser.add_argument("--alone", action="store_true", help="single services of every strategy")
    parser.add_argument("--out", type=Path, help="alone: keep the runs here, and make only those missing")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="alone")
    args = parser.parse_args()
    args.requests = args.requests or (32 if args.alone else 300)
    if not args.alone:
        sys.exit(check(args))
    with tempfile.TemporaryDirectory(prefix="lab-check-") as name:
        sys.exit(check_alone(args, args.out or Path(name)))


if __name__ == "__main__":
    main()
