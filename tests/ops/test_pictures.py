"""Pictures of dashboards, taken by a real Chromium from a page that stands for Grafana."""

from __future__ import annotations

import shutil
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.services.served import free_port
from tools.dashboards import pictures

pytestmark = [
    pytest.mark.ops,
    pytest.mark.skipif(
        not any(map(shutil.which, pictures.CHROMIUM)), reason="NO PICTURE WAS TAKEN: no Chromium"
    ),
]


class StandIn(BaseHTTPRequestHandler):
    """Draws a second after it was loaded, as Grafana draws when its queries are answered."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        page = b"<body><script>setTimeout(() => { document.body.style.background = 'lime' }, 1000)</script>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *words: object) -> None:
        pass


def first_pixel(png: bytes) -> bytes:
    chunks, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            chunks += png[at + 8 : at + 8 + length]
        at += length + 12
    return zlib.decompress(chunks)[1:4]


def test_a_picture_of_each_dashboard_and_view(tmp_path: Path) -> None:
    StandIn.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert pictures.main(["--grafana", url, "--out", str(tmp_path)]) == 0
    finally:
        server.shutdown()
        server.server_close()
    boards = [board["uid"] for board in (pictures.LIVE, pictures.RESULTS)]
    for uid in boards:
        assert f"/d/{uid}?kiosk&theme=dark" in StandIn.asked
        for view, (width, _) in pictures.VIEWS.items():
            content = (tmp_path / f"{uid}-{view}.png").read_bytes()
            size = struct.unpack(">II", content[16:24])
            board = next(b for b in (pictures.LIVE, pictures.RESULTS) if b["uid"] == uid)
            assert size == (width, pictures.height(board, is_narrow=view == "phone"))
            assert first_pixel(content) == b"\x00\xff\x00", "the picture was taken before the page was drawn"


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    assert pictures.main(["--grafana", nobody, "--out", str(tmp_path)]) == 2
    assert f"no Grafana answers at {nobody}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PATH", "/nonexistent")
    assert pictures.main(["--out", str(tmp_path)]) == 2
    assert "apt-get install chromium" in capsys.readouterr().err
