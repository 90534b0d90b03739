"""The way in that all calls share: a body is read, checked and handed to the service.

HTTP enters; a checked request and its response leave. Bodies are parsed here and not by the framework, so
that every error names its field in our shape. The routes are in `services.http.app` and
`services.http.compat`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from services import contract, errors
from services.core.inputs import parse
from services.core.service import Service
from services.http.access import REQUEST_ID
from services.http.response import LiveResponse
from services.http.sse import Writer

BODY_TIMEOUT_S = 30.0
_LARGE_BODY_BYTES = 65_536
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": contract.ErrorBody} for status in (400, 401, 404, 408, 413, 422, 429, 500, 503, 504)
}

AnyRequest = contract.GenerateRequest | contract.ChatRequest
RequestT = TypeVar("RequestT", bound=AnyRequest)
MakeWriter = Callable[[str, float], Writer]
"""From the request's id and its arrival."""


def post(
    path: str, response_model: type[BaseModel], request_model: type[BaseModel], *, streams: bool = True
) -> dict[str, Any]:
    """How a route that takes a body is declared: what it takes, what it gives, every way to say no."""
    schema = {"$ref": f"#/components/schemas/{request_model.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    answer: dict[str, Any] = {"model": response_model}
    if streams:
        answer["content"] = {"text/event-stream": {}}
    responses = {200: answer, **ERRORS}
    return {"path": path, "responses": responses, "openapi_extra": {"requestBody": body}}


class Intake:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(
        self, http: Request, model: type[RequestT], prefix: str, writer_of: Callable[[RequestT], MakeWriter]
    ) -> Response:
        """Read the body as `model` and answer it; `prefix` begins an id that has to be made."""
        arrival_s = time.monotonic()
        body = await read_body(http)
        if body is None:
            return Response()  # to nobody: the client left before its request was complete
        request = await parse_off_the_loop(model, body)
        return await self.respond(http, request, prefix, arrival_s, writer_of(request))

    async def respond(
        self,
        http: Request,
        request: AnyRequest,
        prefix: str,
        arrival_s: float,
        make_writer: MakeWriter,
        *,
        alone: bool = False,
    ) -> LiveResponse:
        """Hand a checked request to the service.

        Raises:
            Refusal: the service does not take it.
        """
        came_with = getattr(http.state, REQUEST_ID, None)
        request_id = request.request_id or came_with or prefix + uuid.uuid4().hex
        live = await self._service.accept(request, request_id, arrival_s, alone=alone)
        max_timeout_s = self._service.settings.max_timeout_s
        timeout_s = min(request.timeout_s or max_timeout_s, max_timeout_s)
        writer = make_writer(request_id, arrival_s)
        return LiveResponse(self._service, live, writer, streamed=request.stream, timeout_s=timeout_s)


async def parse_off_the_loop(model: type[RequestT], body: bytes) -> RequestT:
    """Large bodies are parsed in a thread, so that other answers keep streaming meanwhile."""
    return (
        parse(model, body) if len(body) <= _LARGE_BODY_BYTES else await asyncio.to_thread(parse, model, body)
    )


async def read_body(http: Request) -> bytes | None:
    """The whole body, or None if the client left.

    Raises:
        Refusal: it is larger than allowed, which its own header may already say, or does not come.
    """
    told = http.headers.get("content-length", "")
    if told.isdecimal() and int(told) > contract.MAX_BODY_BYTES:
        raise errors.body_too_large(contract.MAX_BODY_BYTES)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in http.stream():
                body += piece
                if len(body) > contract.MAX_BODY_BYTES:
                    raise errors.body_too_large(contract.MAX_BODY_BYTES)
    except TimeoutError:
        raise errors.body_too_slow(BODY_TIMEOUT_S) from None
    except ClientDisconnect:
        return None
    return bytes(body)
