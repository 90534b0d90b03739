"""What a server says went wrong, in any shape in which servers say it, as one clause with its own words."""

from __future__ import annotations

import json
from typing import Any

MAX_WORDS = 300


def error_in(page: Any) -> str | None:
    """The words of `{"error": ...}` or `{"object": "error", "message": ...}`; None where it is no error."""
    if not isinstance(page, dict):
        return None
    if error := page.get("error"):
        return _describe(error)
    return _describe(page) if page.get("object") == "error" else None


def error_in_text(text: str) -> str | None:
    """The words of the first error in a body: a JSON object, in one line or several, or a line `error: ...`.

    Source: llama.cpp until 2025 names its field `error` in place of `data`; OpenVINO Model Server
    (`http_frontend/http_graph_executor_impl.cpp`) writes bare JSON into its stream.
    """
    if not text.strip():
        return None
    for line in text.split("\n"):
        words = line.strip().removeprefix("error:").strip()
        page = _parse(words)
        if told := error_in(page):
            return told
        if words and line.lstrip().startswith("error:"):
            return _describe(page) if isinstance(page, dict) else words[:MAX_WORDS]
    return error_in(_parse(text))


def as_error_event(data: bytes) -> bytes:
    """The data of an `event: error`, JSON or plain text, as the error object of the API."""
    text = data.decode("utf-8", "replace").strip()
    page = _parse(text)
    if error_in(page):
        return data
    return json.dumps({"error": page if page else text[:MAX_WORDS]}).encode()


def _parse(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _describe(error: Any) -> str:
    """One line for an error object: its code or type, then its message."""
    if not isinstance(error, dict):
        return str(error)
    label = error.get("code") or error.get("type")
    message = error.get("message") or json.dumps(error)
    return f"{label}: {message}" if label else str(message)
