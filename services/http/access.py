"""Stands before every route: the API key, the request id, and one log line a request.

The id is taken from `X-Request-ID` where that is usable, else made. It goes into the scope, back in the
answer's header, and into the log line. `/health` needs no key.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
import uuid
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import errors
from services.errors import ApiError
from services.http.scope import REQUEST_ID

_OPEN_PATHS = ("/health",)
_QUIET_PATHS = ("/health", "/metrics", "/steps")
_USABLE_ID = re.compile(rb"[!-~]{1,128}")

logger = logging.getLogger("lab.access")


class Access:
    """With `api_key` None everybody may come in. `on_refused` hears the code of each refusal."""

    def __init__(self, app: ASGIApp, api_key: str | None, on_refused: Callable[[str], None]) -> None:
        self._app = app
        self._on_refused = on_refused
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        own_id = sent_id if _USABLE_ID.fullmatch(sent_id) else b""
        if own_id:
            scope.setdefault("state", {})[REQUEST_ID] = own_id.decode()
        answered_id = own_id or uuid.uuid4().hex.encode()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status, answered_id
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [value for name, value in message["headers"] if name == b"x-request-id"]
                if named:
                    answered_id = named[0]
                else:
                    message["headers"] = [*message["headers"], (b"x-request-id", answered_id)]
            await send(message)

        try:
            if self._may_enter(scope["path"], headers.get(b"authorization", b"")):
                await self._app(scope, receive, answer)
            else:
                error = errors.unauthorized()
                self._on_refused(error.code)
                await _unauthorized(error, scope, receive, answer)
        finally:
            _log(scope, status, answered_id.decode(), time.monotonic() - began_s)

    def _may_enter(self, path: str, authorization: bytes) -> bool:
        if self._expected is None or path in _OPEN_PATHS:
            return True
        return secrets.compare_digest(authorization, self._expected)


async def _unauthorized(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"content-type": "application/json", "www-authenticate": "Bearer"}
    await Response(error.json_bytes, error.status, headers)(scope, receive, send)


def _log(scope: Scope, status: int, request_id: str, seconds: float) -> None:
    """Status 0: the client left before there was one."""
    level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(seconds * 1000, 3),
        "request_id": request_id,
    }
    logger.log(level, "answered", extra={"fields": fields})
