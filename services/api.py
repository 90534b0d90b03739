"""The HTTP routes, thin: bytes to a request, a request to a response, every error in one shape.

What enters is HTTP; what leaves is what `services.contract` describes. Bodies are parsed here and not by
the framework, so that every error names its field in our shape. The engine is behind `services.service`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from services import contract, refusals
from services.frames import FrameWriter, Shape
from services.live_response import LiveResponse
from services.model_card import lab_version
from services.refusals import Refusal
from services.requests import parse
from services.service import Service

_ID_PREFIXES: dict[Shape, str] = {"completions": "cmpl-", "chat": "chatcmpl-"}
_LARGE_BODY_BYTES = 65_536
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": contract.ErrorBody} for status in (400, 413, 422, 429, 503, 504)
}


def create_app(service: Service) -> FastAPI:
    """The application around a service; starting and stopping that is the caller's business."""
    app = FastAPI(title="batching-lab", version=lab_version(), redoc_url=None)
    _add_generation(app, service)
    _add_pages(app, service)
    _add_error_handlers(app, service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    async def answer(
        http: Request, model: type[contract.GenerateRequest] | type[contract.ChatRequest], shape: Shape
    ) -> Response:
        arrival_s = time.monotonic()
        body = await _read_body(http)
        if body is None:
            return Response()  # to nobody: the client left before its request was complete
        request = await _parse(model, body)
        request_id = request.request_id or _ID_PREFIXES[shape] + uuid.uuid4().hex
        live = await service.accept(request, request_id, arrival_s)
        writer = FrameWriter(shape, request_id, int(time.time()), service.model_name)
        return LiveResponse(service, live, request, writer)

    def post(path: str, response_model: type[BaseModel], request_model: type[BaseModel]) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{request_model.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        responses = {200: {"model": response_model}, **_ERRORS}
        return {"path": path, "responses": responses, "openapi_extra": {"requestBody": body}}

    @app.post(**post("/generate", contract.Completion, contract.GenerateRequest))
    @app.post(**post("/v1/completions", contract.Completion, contract.GenerateRequest))
    async def generate(http: Request) -> Response:
        """Answer one or many prompts; with `stream` as server-sent events (see `StreamChunk`)."""
        return await answer(http, contract.GenerateRequest, "completions")

    @app.post(**post("/v1/chat/completions", contract.ChatCompletion, contract.ChatRequest))
    async def chat(http: Request) -> Response:
        """The same in the chat shape: the model's chat template makes the prompt."""
        return await answer(http, contract.ChatRequest, "chat")


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=contract.Health, responses={503: {"model": contract.Health}})
    async def health() -> Response:
        """Never waits for the model."""
        health = service.health()
        return JSONResponse(health.model_dump(), status_code=200 if health.status == "ok" else 503)

    @app.get("/model", responses={503: {"model": contract.ErrorBody}})
    async def model() -> contract.ModelCard:
        """What is loaded, how it is batched, and how many prompts to send in one request."""
        return service.model_card()

    @app.get("/v1/models", responses={503: {"model": contract.ErrorBody}})
    async def models() -> contract.ModelList:
        card = service.model_card()
        entry = contract.ModelEntry(id=card.model, created=service.created, max_model_len=card.max_model_len)
        return contract.ModelList(data=[entry])

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus series; empty until the model is loaded."""
        text = b"" if service.metrics is None else service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/steps", response_model=contract.Steps, responses={422: {"model": contract.ErrorBody}})
    async def steps(after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """The engine's steps from number `after` on."""
        return Response(service.steps.page(after), media_type="application/json")


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    def answer(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
        return JSONResponse(refusal.body, refusal.status, headers={**refusal.headers, **(headers or {})})

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        if service.metrics is not None:
            service.metrics.request_rejected(error.code)
        return answer(error)

    @app.exception_handler(HTTPException)
    async def no_route(http: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        message = f"{http.method} {http.url.path}: {status.phrase.lower()}."
        return answer(Refusal(status, message, code=status.name.lower()), error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_query(_: Request, error: RequestValidationError) -> Response:
        return answer(refusals.from_failures([{**item, "loc": item["loc"][1:]} for item in error.errors()]))

    @app.exception_handler(Exception)
    async def crashed(_: Request, error: Exception) -> Response:
        return answer(Refusal(500, "The service failed; its log says why.", code="internal_error"))


async def _parse(
    model: type[contract.GenerateRequest] | type[contract.ChatRequest], body: bytes
) -> contract.GenerateRequest | contract.ChatRequest:
    """Large bodies are parsed in a thread, so that other answers keep streaming meanwhile."""
    return (
        parse(model, body) if len(body) <= _LARGE_BODY_BYTES else await asyncio.to_thread(parse, model, body)
    )


async def _read_body(http: Request) -> bytes | None:
    """The whole body, or None if the client left.

    Raises:
        Refusal: it is larger than allowed, which its own header may already say.
    """
    told = http.headers.get("content-length", "")
    if told.isdecimal() and int(told) > contract.MAX_BODY_BYTES:
        raise refusals.body_too_large(contract.MAX_BODY_BYTES)
    body = bytearray()
    try:
        async for piece in http.stream():
            body += piece
            if len(body) > contract.MAX_BODY_BYTES:
                raise refusals.body_too_large(contract.MAX_BODY_BYTES)
    except ClientDisconnect:
        return None
    return bytes(body)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The framework's schema plus the request models, whose bodies it does not parse itself."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models = schema["components"]["schemas"]
        for model in (contract.GenerateRequest, contract.ChatRequest, contract.StreamChunk):
            definition = model.model_json_schema(ref_template="#/components/schemas/{model}")
            models.update(definition.pop("$defs", {}))
            models[model.__name__] = definition
        app.openapi_schema = schema
    return app.openapi_schema
