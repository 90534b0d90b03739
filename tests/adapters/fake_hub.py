"""A model hub on a loopback port: what huggingface_hub asks of the real one, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`files` of the one repository `org/model`. `cut_after` ends as many answers early, at so many bytes."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    """Files that are kept as large ones, known by their SHA-256."""
    cut_after: list[int] = field(default_factory=list)
    stall_after: int | None = None
    """Send so many bytes of a large file and then nothing, with the connection open."""
    damaged: set[str] = field(default_factory=set)
    statuses: list[int] = field(default_factory=list)
    """Answer requests with these first."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of every download."""
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def info(self) -> dict[str, object]:
        siblings = []
        for name, content in self.files.items():
            blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob_id}
            if name in self.large:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"_id": "1", "id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings}


@contextmanager
def fake_hub(**files: bytes) -> Iterator[FakeHub]:
    hub = FakeHub(files=dict(files))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            name = unquote(urlsplit(self.path).path).partition("/org/model/resolve/main/")[2]
            if name not in hub.files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            etag = hashlib.sha256(hub.files[name]).hexdigest()
            self.send_response(200)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(hub.files[name])))
            self.end_headers()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if hub.statuses:
                self._send(hub.statuses.pop(0), b'{"error": "told to"}')
            elif path.startswith("/api/models/org/model"):
                self._send(200, json.dumps(hub.info()).encode())
            elif path.startswith("/org/model/resolve/"):
                self._send_file(path.split("/", 5)[5])
            else:
                self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

        def _send_file(self, name: str) -> None:
            wanted = self.headers.get("Range")
            hub.requests.append((name, wanted))
            content = hub.files[name]
            if name in hub.damaged:
                content = bytes(len(content))
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            body = content[start:]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body)))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if name in hub.large and hub.stall_after is not None:
                self.wfile.write(body[: hub.stall_after])
                self.wfile.flush()
                hub.stalled.set()
                hub.released.wait(60)
                body = body[hub.stall_after :]
            if name in hub.large and hub.cut_after:
                body = body[: hub.cut_after.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that are killed hang up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
