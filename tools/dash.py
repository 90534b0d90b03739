"""`make dash`: Prometheus over the services of this machine and the history, the results page, and Grafana.

All of it listens on this machine alone. Grafana needs Docker. The page opens in the browser of a person.

What is missing is said, with the way to get it, and the rest goes on. Ctrl-C or SIGTERM ends all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import httpx

from adapters.base import LabError
from harness.history import store
from harness.history.exposition import to_openmetrics
from harness.replay.interrupts import on_interrupt, raise_interrupt
from harness.results.output_dir import make_folder

DOCKER = Path(__file__).parents[1] / "docker"
IMAGE = re.compile(r"grafana/grafana:[\d.]+")
"""The version stands in docker/compose.yml."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make dash", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["localhost:8000"], metavar="HOST:PORT")
    parser.add_argument("--folder", type=Path, default=Path("results/prometheus"))
    parser.add_argument("--port", type=int, default=9090)
    parser.add_argument("--grafana-port", type=int, default=3000)
    parser.add_argument("--results", type=Path, default=Path("results"), help="of the results page")
    parser.add_argument("--results-port", type=int, default=8790)
    parser.add_argument("--history", type=Path, default=Path("history"), help="to import into Prometheus")
    parser.add_argument("--no-browser", action="store_true", help="open no results page in the browser")
    args = parser.parse_args(arguments)
    program = shutil.which("prometheus")
    if program is None:
        print(
            "Prometheus is not installed: on Debian `apt-get install prometheus`, on macOS `brew install "
            "prometheus`, else https://prometheus.io/download; then `make dash` again.",
            file=sys.stderr,
        )
        return 2
    try:
        make_folder(args.folder)
        make_folder(args.results)  # a fresh clone has none
        config = prepare(args.folder, args.targets)
        print(f"History: {import_history(args.history, args.folder)}")
    except LabError as error:
        print(f"make dash: {error}", file=sys.stderr)
        return 2
    print(f"Prometheus: http://localhost:{args.port}, watching {', '.join(args.targets)}")
    print("A service to watch: make run SERVICE=continuous PORT=8000")
    page_port = str(args.results_port)
    commands = [
        [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={args.folder / 'data'}",
            "--storage.tsdb.retention.time=10y",
            "--enable-feature=exemplar-storage",
            f"--web.listen-address=127.0.0.1:{args.port}",
            "--log.level=warn",
        ],
        [sys.executable, "-m", "tools.cli", "results", str(args.results), "--port", page_port],
    ]
    if docker := shutil.which("docker"):
        print(f"Grafana: http://localhost:{args.grafana_port}", flush=True)
        commands.append(grafana_command(docker, args.port, args.grafana_port))
    else:
        print(
            "Docker is not installed: import harness/grafana_dash.json into a Grafana of your own.",
            flush=True,
        )
    return _run(commands, None if args.no_browser or not has_browser() else f"http://127.0.0.1:{page_port}/")


def _run(commands: list[list[str]], shown_url: str | None) -> int:
    """Until the first command ends, or this process is told to end."""
    running: list[subprocess.Popen[bytes]] = []
    with on_interrupt(raise_interrupt):
        try:
            running.extend(map(subprocess.Popen, commands))
            if shown_url:
                _show(shown_url)
            return running[0].wait()
        except KeyboardInterrupt:
            return 0
        finally:
            for process in running:
                process.terminate()
                process.wait()


def _show(url: str) -> None:
    for _ in range(100):
        with contextlib.suppress(httpx.TransportError):
            httpx.get(url)
            webbrowser.open(url)
            return
        time.sleep(0.2)


def has_browser() -> bool:
    """A person at a screen. In a terminal without one a text browser would open over Prometheus's log."""
    has_screen = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    return sys.stdout.isatty() and bool(has_screen)


def import_history(history: Path, folder: Path) -> str:
    """Write the history as blocks of the data base, unless they are there; returns what was done.

    Raises:
        LabError: promtool refuses it.
    """
    try:
        text = to_openmetrics(store.read(history).rows)
    except LabError as error:
        return str(error)
    kept = folder / "data/history.om"  # beside its blocks, so that who removes those removes it
    if kept.exists() and kept.read_text(encoding="utf-8") == text:
        return f"{history} is in Prometheus already"
    promtool = shutil.which("promtool")
    if promtool is None:
        return f"{history} is not imported, since promtool is not installed (it comes with Prometheus)"
    new = folder / "history.new.om"
    new.write_text(text, encoding="utf-8")
    command = [promtool, "tsdb", "create-blocks-from", "openmetrics", str(new), str(folder / "data")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise LabError(f"promtool refuses the history: {made.stderr.strip()}")
    new.replace(kept)
    return f"{history} imported"


def prepare(folder: Path, targets: Sequence[str]) -> Path:
    """Put the rules and the configuration into `folder` with `targets`; returns where it is."""
    (folder / "targets").mkdir(parents=True, exist_ok=True)
    for source in (DOCKER / "prometheus").glob("*.yml"):
        shutil.copy(source, folder)
    (folder / "targets/services.json").write_text(json.dumps([{"targets": list(targets)}]), encoding="utf-8")
    return folder / "prometheus.yml"


def grafana_command(docker: str, prometheus_port: int, port: int) -> list[str]:
    """Grafana on the host's network, with the data source and the dashboards provisioned."""
    grafana = DOCKER / "grafana"
    settings = {
        "PROMETHEUS_URL": f"http://localhost:{prometheus_port}",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
    }
    return [
        *(docker, "run", "--rm", "--network", "host"),
        *(part for name, value in settings.items() for part in ("-e", f"{name}={value}")),
        *("-v", f"{grafana / 'provisioning'}:/etc/grafana/provisioning:ro"),
        *("-v", f"{grafana / 'dashboards'}:/var/lib/grafana/dashboards:ro"),
        *IMAGE.findall((DOCKER / "compose.yml").read_text()),
    ]


if __name__ == "__main__":
    sys.exit(main())
