"""The summary for Prometheus: a file that parses, and a gateway that may be missing."""

from __future__ import annotations

import base64
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from harness.plan.schedule import Arrivals, Load
from harness.results.openmetrics import push, write_openmetrics
from tests.harness.made_rows import made_frame, made_manifest, made_row

ROWS = [made_row(i, sent_s=i, scheduled_s=i, chunk_s=(i + 0.5, i + 1.0)) for i in range(60)]


def test_the_file_says_what_the_table_says(tmp_path: Path) -> None:
    manifest = made_manifest(ROWS, validity={"level": "VALID"})
    path = write_openmetrics(tmp_path / "run.parquet", made_frame(ROWS), manifest)
    text = path.read_text(encoding="utf-8")
    assert text.endswith("# EOF\n")
    samples = {
        (sample.name, sample.labels.get("quantile")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["lab_run_output_tokens_per_second", None] == pytest.approx(2.0)
    assert samples["lab_run_ttft_seconds", "0.95"] == pytest.approx(0.5)
    assert ("lab_run_ttft_seconds", "0.99") not in samples
    assert samples["lab_run_is_valid", None] == 1


def test_percentiles_come_with_their_ends_and_the_steady_window(tmp_path: Path) -> None:
    rows = [
        made_row(
            i, sent_s=i, scheduled_s=i, offset_s=float(i), chunk_s=(i + 0.5 + i / 1e3, i + 1.0 + i / 1e3)
        )
        for i in range(60)
    ]
    manifest = made_manifest(rows, load=Load(Arrivals.POISSON, rate=1.0))
    text = write_openmetrics(tmp_path / "run.parquet", made_frame(rows), manifest).read_text()
    samples = {
        (sample.name, sample.labels.get("quantile")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for q in ("0.50", "0.95"):
        low, middle, high = (
            samples[f"lab_run_{name}_seconds", q] for name in ("ttft_low", "ttft", "ttft_high")
        )
        assert 0.5 <= low < middle < high <= 0.559
    assert ("lab_run_ttft_low_seconds", "0.99") not in samples
    assert 0.9 < samples["lab_run_steady_share", None] < 1
    assert samples["lab_run_steady_requests", None] == 56
    assert samples["lab_run_steady_output_tokens_per_second", None] == pytest.approx(2.0, rel=0.05)
    assert samples["lab_run_steady_ttft_seconds", "0.50"] == pytest.approx(0.53, abs=0.002)
    assert ("lab_run_steady_ttft_seconds", "0.95") not in samples  # 56 requests


def test_the_summary_is_pushed_where_a_gateway_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, bytes]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(202)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    manifest = made_manifest(ROWS)
    monkeypatch.delenv("PUSHGATEWAY_URL", raising=False)
    assert push(made_frame(ROWS), manifest) is None
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("PUSHGATEWAY_URL", f"http://127.0.0.1:{server.server_port}")
        assert push(made_frame(ROWS), manifest) is None
    ((path, body),) = got
    assert path.startswith("/metrics/job/batching_lab/")
    assert b"lab_run_output_tokens_per_second" in body
    problem = push(made_frame(ROWS), manifest)
    assert problem is not None
    assert "could not be pushed" in problem


def test_a_login_in_the_gateway_s_url_is_used_and_stands_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[str | None] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.headers["Authorization"])
            self.send_response(202)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    manifest = made_manifest(ROWS)
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("PUSHGATEWAY_URL", f"http://me:hunter2@127.0.0.1:{server.server_port}")
        assert push(made_frame(ROWS), manifest) is None
        assert got == ["Basic " + base64.b64encode(b"me:hunter2").decode()]
    for url in (f"http://me:hunter2@127.0.0.1:{server.server_port}", "http://me:hunter2@h:port", "hunter2@"):
        monkeypatch.setenv("PUSHGATEWAY_URL", url)
        problem = push(made_frame(ROWS), manifest)
        assert problem is not None
        assert "could not be pushed" in problem
        assert "hunter2" not in problem
