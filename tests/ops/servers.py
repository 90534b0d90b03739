"""Real Prometheus and Alertmanager for tests, and Prometheus's answers."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.services.served import free_port, until

ROOT = Path(__file__).parents[2]
PROMETHEUS_FILES = ROOT / "docker/prometheus"


def program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is not on the PATH: `make test-ops` installs it where it can"
    return found


@dataclass
class Prometheus:
    url: str

    def api(self, path: str, **params: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=20).json()
        assert answer["status"] == "success", (params, answer)
        return answer["data"]

    def values(self, query: str, *, since_s: float = 0, step_s: float = 1, at_s: float = 0) -> list[Any]:
        """The series that have a value other than NaN: over the time up to `at_s`, or at that moment."""
        times = {"start": at_s - since_s, "end": at_s, "step": step_s} if since_s else {"time": at_s}
        found = self.api("query_range" if since_s else "query", query=query, **times)["result"]
        samples = [one.get("values") or [one["value"]] for one in found]
        return [
            one["metric"]
            for one, values in zip(found, samples, strict=True)
            if any(value != "NaN" for _, value in values)
        ]


@contextlib.contextmanager
def prometheus(
    folder: Path, targets: Mapping[str, str], *, alertmanager: str = "", rules: str = ""
) -> Iterator[Prometheus]:
    """Scrape `targets`, name to host and port, once a second; `folder/data` may hold blocks already."""
    config = yaml.safe_load((PROMETHEUS_FILES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"] = [
        {"job_name": "batching-lab", "static_configs": [{"targets": list(targets.values())}]}
    ]
    config["rule_files"] = [str(PROMETHEUS_FILES / "field_names.yml"), *([rules] if rules else [])]
    config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    if not alertmanager:
        del config["alerting"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    arguments = [
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--storage.tsdb.retention.time=10y",
        "--enable-feature=exemplar-storage",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with running([program("prometheus"), *arguments], f"http://127.0.0.1:{port}/-/ready", folder):
        yield Prometheus(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def running(command: list[str], ready_url: str, folder: Path) -> Iterator[None]:
    log = (folder / f"{Path(command[0]).name}.log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)

    def is_ready() -> bool:
        assert process.poll() is None, Path(log.name).read_text()[-2000:]
        try:
            return httpx.get(ready_url).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(is_ready, 60)
        yield
    finally:
        process.terminate()
        process.wait()
        log.close()


@contextlib.contextmanager
def traffic(urls: list[str]) -> Iterator[None]:
    """Streamed requests, long and short, to each of `urls`, one after another, until the block ends."""
    stop = threading.Event()

    def send(url: str) -> None:
        fields: dict[str, Any] = {"prompt": ["ab", "abcd"], "stream": True, "ignore_eos": True}
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                client.post(f"{url}/generate", json={**fields, "max_tokens": 8})
                stop.wait(0.05)

    threads = [threading.Thread(target=send, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
