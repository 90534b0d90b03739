"""What all routes that generate share: the body is read, checked and handed to the service.

Bodies are parsed here and not by the framework, so that every error names its field in our shape.
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

from services import errors
from services.contract.requests import MAX_BODY_BYTES, ChatRequest, GenerateRequest
from services.contract.responses import ErrorBody
from services.core.inputs import parse
from services.core.outputs import RequestState
from services.core.service import Service
from services.http.response import GenerationResponse
from services.http.scope import REQUEST_ID
from services.http.sse import Writer

BODY_TIMEOUT_S = 30.0
_LARGE_BODY_BYTES = 65_536
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504)
}

AnyRequest = GenerateRequest | ChatRequest
RequestT = TypeVar("RequestT", bound=AnyRequest)
BodyT = TypeVar("BodyT", bound=BaseModel)
MakeWriter = Callable[[RequestState], Writer]


def post(
    path: str, response_model: type[BaseModel], request_model: type[BaseModel], *, streams: bool = True
) -> dict[str, Any]:
    """How a route that takes a body is declared: what it takes, what it gives, every error."""
    schema = {"$ref": f"#/components/schemas/{request_model.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    answer: dict[str, Any] = {"model": response_model}
    if streams:
        answer["content"] = {"text/event-stream": {}}
    responses = {200: answer, **ERRORS}
    return {"path": path, "responses": responses, "openapi_extra": {"requestBody": body}}


class RequestHandler:
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
        exclusive: bool = False,
    ) -> GenerationResponse:
        """Hand a checked request to the service.

        Raises:
            ApiError: the service does not accept it.
        """
        sent_id = getattr(http.state, REQUEST_ID, None)
        request_id = request.request_id or sent_id or prefix + uuid.uuid4().hex
        state = await self._service.accept(request, request_id, arrival_s, exclusive=exclusive)
        max_timeout_s = self._service.settings.max_timeout_s
        timeout_s = min(request.timeout_s or max_timeout_s, max_timeout_s)
        writer = make_writer(state)
        return GenerationResponse(self._service, state, writer, streamed=request.stream, timeout_s=timeout_s)


async def parse_off_the_loop(model: type[BodyT], body: bytes) -> BodyT:
    """Large bodies are parsed in a thread, so that other answers keep streaming meanwhile."""
    return (
        parse(model, body) if len(body) <= _LARGE_BODY_BYTES else await asyncio.to_thread(parse, model, body)
    )


async def read_body(http: Request) -> bytes | None:
    """The whole body, or None if the client left.

    Raises:
        ApiError: it is compressed, larger than allowed (which its own header may already say), or does not
            come.
    """
    encoding = http.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise errors.body_encoded(encoding)
    length = http.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise errors.body_too_large(MAX_BODY_BYTES)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in http.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise errors.body_too_large(MAX_BODY_BYTES)
    except TimeoutError:
        raise errors.body_too_slow(BODY_TIMEOUT_S) from None
    except ClientDisconnect:
        return None
    return bytes(body)
