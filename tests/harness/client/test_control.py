"""Pages of a server that is not ours, or not well, beside the answers that are measured."""

from __future__ import annotations

import httpx
import pytest

from harness.client.control import Control


@pytest.mark.parametrize(
    "page", [b"[" * 100_000, b"\xff", b"", b"[]", b'"x"', b'{"data": [{"id": null}]}', b'{"data": {"a": 1}}']
)
def test_a_page_of_another_kind_is_none_of_ours(monkeypatch: pytest.MonkeyPatch, page: bytes) -> None:
    monkeypatch.setattr(httpx.Client, "get", lambda *_, **__: httpx.Response(200, content=page))
    with Control("http://127.0.0.1:1") as control:
        assert (control.health(), control.model_card(), control.next_step()) == (None, None, None)
