"""What all routes that generate share: the body is read, checked and handed to the service.

Bodies are parsed here and not by the framework, so that every error names its field in our shape.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from services import errors
from services.contract.checks import MAX_BODY_BYTES
from services.contract.requests import ChatRequest, GenerateRequest
from services.contract.responses import ErrorBody
from services.core.body import LARGE_BODY_BYTES, parse
from services.core.outputs import RequestState
from services.core.service import Service
from services.http.response import GenerationResponse
from services.http.scope import ABORT, REQUEST_ID
from services.http.sse import Writer

BODY_TIMEOUT_S = 30.0
MAX_BODIES_BYTES = 64 << 20
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
        self._num_body_bytes = 0
        """Of bodies that are being read or parsed."""
        self._turn = asyncio.Lock()

    async def answer(
        self, http: Request, model: type[RequestT], prefix: str, writer_of: Callable[[RequestT], MakeWriter]
    ) -> Response:
        """Read the body as `model` and answer it; `prefix` begins an id that has to be made."""
        arrival_s = time.monotonic()
        request = await self.read(http, model)
        if request is None:
            return Response()  # to nobody: the client left before its request was complete
        return await self.respond(http, request, prefix, arrival_s, writer_of(request))

    async def read(self, http: Request, model: type[BodyT]) -> BodyT | None:
        """The body as `model`. Raises and returns as `read_as`."""
        return await self.read_as(http, partial(parse, model))

    async def read_as(self, http: Request, parse_body: Callable[[bytes], BodyT]) -> BodyT | None:
        """The parsed body, or None if the client left. Large ones are parsed beside the event loop.

        Raises:
            ApiError: it is compressed, too large, does not come, or is no such request.
        """
        body = bytearray()
        try:
            if not await self._read_body(http, body):
                return None
            async with self._turn:
                await asyncio.sleep(0)  # one request a turn of the loop: a burst of them holds up no stream
            connection = http.scope.get("extensions", {}).get(ABORT)
            if connection is not None and connection["is_closing"]():
                return None
            if len(body) <= LARGE_BODY_BYTES:
                return parse_body(bytes(body))
            async with self._service.byte_limit.hold(len(body)):
                return await asyncio.to_thread(parse_body, bytes(body))
        finally:
            self._num_body_bytes -= len(body)

    async def _read_body(self, http: Request, body: bytearray) -> bool:
        """Fill `body`; False if the client left. A length above the limit is refused by its own header."""
        encoding = ",".join(http.headers.getlist("content-encoding"))
        if any(name.strip().lower() not in ("", "identity") for name in encoding.split(",")):
            raise errors.body_encoded(encoding)
        length = http.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise errors.body_too_large(MAX_BODY_BYTES)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for piece in http.stream():
                    body += piece
                    self._num_body_bytes += len(piece)
                    if len(body) > MAX_BODY_BYTES:
                        raise errors.body_too_large(MAX_BODY_BYTES)
                    if self._num_body_bytes > MAX_BODIES_BYTES:
                        raise errors.too_many_bytes()
        except TimeoutError:
            raise errors.body_too_slow(BODY_TIMEOUT_S) from None
        except ClientDisconnect:
            return False
        return True

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
