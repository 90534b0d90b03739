"""`make dash`: Prometheus over the services of this machine, and Grafana where Docker is there.

What is missing is said, with the way to get it, and the rest goes on. Ctrl-C ends all of it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
    args = parser.parse_args(arguments)
    program = shutil.which("prometheus")
    if program is None:
        print(
            "Prometheus is not installed: on Debian `apt-get install prometheus`, on macOS `brew install "
            "prometheus`, else https://prometheus.io/download; then `make dash` again.",
            file=sys.stderr,
        )
        return 2
    config = prepare(args.folder, args.targets)
    print(f"Prometheus: http://localhost:{args.port}, watching {', '.join(args.targets)}")
    print("A service to watch: make run SERVICE=continuous PORT=8000")
    results = subprocess.Popen(
        [sys.executable, "-m", "tools.cli", "results", str(args.results), "--port", str(args.results_port)]
    )
    grafana = None
    if docker := shutil.which("docker"):
        print(f"Grafana: http://localhost:{args.grafana_port}")
        grafana = subprocess.Popen(grafana_command(docker, args.port, args.grafana_port))
    else:
        print("Docker is not installed: import harness/grafana_dash.json into a Grafana of your own.")
    prometheus = subprocess.Popen(
        [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={args.folder / 'data'}",
            "--storage.tsdb.retention.time=10y",
            "--enable-feature=exemplar-storage",
            f"--web.listen-address=:{args.port}",
            "--log.level=warn",
        ]
    )
    try:
        return prometheus.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for process in filter(None, (prometheus, results, grafana)):
            process.terminate()
            process.wait()


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
