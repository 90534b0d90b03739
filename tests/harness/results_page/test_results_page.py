"""The page over a folder of results: what it lists, finds and opens, and what hostile files cannot do."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from adapters.base import ConfigError
from harness.results.manifest import RunManifest, Validity
from harness.results.parquet_file import MANIFEST_KEY
from harness.results.record import make_table, write_parquet
from harness.results.table_file import write_table
from harness.results_page.app import make_app
from harness.results_page.index import ResultIndex
from harness.results_page.live import LiveSteps
from tests.harness.made_rows import made_manifest, made_row
from tests.harness.page.test_report_page import HOSTILE, write_comparison
from tests.services.served import serving
from tools.cli import main

BASE = "http://127.0.0.1"


def write_run(path: Path, **changes: object) -> RunManifest:
    arm = str(changes.get("arm", "continuous"))
    rows = [made_row(i, sent_s=i, chunk_s=(i + 0.5, i + 1.0), arm=arm) for i in range(4)]
    manifest = made_manifest(rows, validity=Validity(), **changes)
    write_parquet(path, make_table(rows), manifest)
    return manifest


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    folder = tmp_path / "results"
    folder.mkdir()
    write_comparison(folder, "baseline", "static", "continuous")
    write_run(folder / "one.parquet", model="tiny", arm="alone")
    (tmp_path / "secret.parquet").write_bytes((folder / "one.parquet").read_bytes())
    with TestClient(make_app(folder), base_url=BASE) as found:
        yield found


def test_it_lists_filters_and_opens(client: TestClient) -> None:
    lines = client.get("/api/results").json()
    assert {line["file"] for line in lines} == {"comparison.parquet", "one.parquet"}  # no step logs
    (tiny,) = client.get("/api/results", params={"model": "tiny"}).json()
    assert client.get("/api/results", params={"text": "CONTINUOUS", "level": "INVALID"}).json() == []
    page = client.get("/").text
    assert all(line["id"] in page for line in lines)
    (comparison,) = (line for line in lines if line["kind"] == "comparison")
    report = client.get("/report", params={"id": comparison["id"]})
    assert "continuous wins" in report.text
    told = client.get("/api/report", params={"id": [tiny["id"], comparison["id"]]}).json()
    assert len(told["arms"]) == 4


def test_csv_holds_the_same_lines(client: TestClient) -> None:
    table = list(csv.DictReader(io.StringIO(client.get("/api/results?format=csv").text)))
    assert table == client.get("/api/results").json()


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    from harness.results_page import index as module

    whole = module._line
    monkeypatch.setattr(module, "_line", lambda path, place: read.append(place) or whole(path, place))
    write_run(tmp_path / "a.parquet")
    write_run(tmp_path / "b.parquet")
    index = ResultIndex(tmp_path)
    index.read()
    index.read()
    write_run(tmp_path / "b.parquet", model="other")
    assert [line["file"] for line in index.search(model="other")] == ["b.parquet"]
    assert read == ["a.parquet", "b.parquet", "b.parquet"]


def test_requests_at_once_see_the_files_that_lay_there_before_them(tmp_path: Path) -> None:
    index = ResultIndex(tmp_path)

    def write_and_find(number: int) -> bool:
        write_run(tmp_path / f"{number}.parquet")
        return any(line["file"] == f"{number}.parquet" for line in index.search())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_find, range(64)))


TRAVERSALS = [
    "../secret.parquet", "..%2fsecret.parquet", "%2e%2e/secret.parquet", "....//secret.parquet", "%00",
    "/etc/passwd", "file:///etc/passwd", "..\\secret.parquet", "one.parquet", "one.parquet\0", "\0", "", " ",
    "~", "*", "\u2025/secret.parquet", "a" * 5000, "' or 1=1 --", "$(id)", "`id`", "${HOME}", "{{7*7}}",
    "<script>",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSALS)
def test_an_id_is_no_path(client: TestClient, name: str) -> None:
    for place in ("/report", "/api/report"):
        assert client.get(place, params={"id": name}).status_code in (404, 422)
    assert client.get(f"/{name.strip() or 'x'}".replace("\0", "%00")).status_code in (400, 404)


@pytest.mark.parametrize("text", [
    "' or 1=1 --", "'; drop table lines; --", "%", "_", "read_csv('/etc/passwd')", "$level", "\0", "\\", "\"",
    "\ud7ff", "x" * 10_000,
])  # fmt: skip
def test_a_filter_is_text(client: TestClient, text: str) -> None:
    for field in ("text", "level", "model"):
        assert client.get("/api/results", params={field: text}).json() == []
    assert len(client.get("/api/results").json()) == 2


@pytest.mark.parametrize("name", [
    HOSTILE.replace("/", ""), "<img src=x onerror=alert(1)>", "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)",
    "a\nb", "\x1b[31mred", "\u202egnp", '"><b>', "a'b", "$(id)",
])  # fmt: skip
def test_hostile_names_are_text(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / f"{name}.parquet", model=name, arm=name)
    with TestClient(make_app(tmp_path), base_url=BASE) as client:
        (line,) = client.get("/api/results").json()
        page = client.get("/").text
        assert page.count("<script>") == 1
        assert "<img" not in page
        assert "\x1b" not in page
        report = client.get("/report", params={"id": line["id"]})
        assert report.status_code == 200
        assert "<img" not in report.text.partition('<script type="application/json"')[0]
        (row,) = csv.DictReader(io.StringIO(client.get("/api/results?format=csv").text))
        assert row["arms"][:1] not in ("=", "+", "-", "@")


@pytest.mark.parametrize("raw", [
    b"", b"{", b"null", b"[]", b"1", b'"x"', b"{}", b'{"kind":"comparison"}',
    b'{"kind":"comparison","runs":[]}', b"[" * 5000, b'{"runs":{"0":1}}', b"\xff\xfe",
    b'{"kind":"comparison","runs":[null]}',
])  # fmt: skip
def test_hostile_manifests_are_listed_with_their_problem(tmp_path: Path, raw: bytes) -> None:
    write_table(tmp_path / "x.parquet", pa.table({"a": [1]}), MANIFEST_KEY, raw)
    (tmp_path / "y.parquet").write_bytes(b"PAR1" + raw + b"PAR1")
    write_run(tmp_path / "good.parquet")
    with TestClient(make_app(tmp_path), base_url=BASE) as client:
        lines = {line["file"]: line for line in client.get("/api/results").json()}
        assert lines["x.parquet"]["problem"]
        assert lines["y.parquet"]["problem"]
        assert not lines["good.parquet"]["problem"]
        assert client.get("/report", params={"id": lines["x.parquet"]["id"]}).status_code == 422


def test_links_out_of_the_folder_and_steps_elsewhere_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    write_run(tmp_path / "secret.parquet")
    (folder / "link.parquet").symlink_to(tmp_path / "secret.parquet")
    (folder / "loop.parquet").symlink_to(folder / "loop.parquet")
    os.mkfifo(folder / "pipe.parquet")
    write_comparison(folder, "baseline", "static")
    with TestClient(make_app(folder), base_url=BASE) as client:
        (line,) = client.get("/api/results").json()
        assert 'id="slots"' in client.get("/report", params={"id": line["id"]}).text
        for log in folder.glob("*.steps.parquet"):
            log.rename(tmp_path / log.name)
        assert 'id="slots"' not in client.get("/report", params={"id": line["id"]}).text


def test_only_this_machine_may_ask_and_nothing_may_be_changed(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/api/results").status_code == 405
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "access-control-allow-origin" not in answer.headers


def test_a_folder_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["http://example.com/", "https://127.0.0.1", "http://u@127.0.0.1", "file:///etc"]
)
def test_only_a_service_of_this_machine_is_watched(url: str) -> None:
    with pytest.raises(ConfigError, match="this machine"):
        LiveSteps(url)


def test_a_running_service_is_shown_step_by_step(tmp_path: Path) -> None:
    with serving() as served, TestClient(make_app(tmp_path, LiveSteps(served.url)), base_url=BASE) as page:
        assert "slot by slot" in page.get("/").text
        served.post(prompt="x", max_tokens=5)
        told = page.get("/api/live").json()
        assert (told["steps"][0]["num_rows"], told["slots"]) == (1, 16)
        again = page.get("/api/live", params={"after": told["next"]}).json()
        assert (again["steps"], again["is_new"]) == ([], False)
        assert page.get("/api/live", params={"after": 10**9}).json()["is_new"]  # it was started anew
    with TestClient(make_app(tmp_path, LiveSteps(served.url)), base_url=BASE) as page:
        assert "no server answers" in page.get("/api/live").json()["problem"]
    with TestClient(make_app(tmp_path), base_url=BASE) as page:
        assert page.get("/api/live").status_code == 404
        assert "canvas" not in page.get("/").text
