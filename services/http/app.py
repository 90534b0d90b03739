"""The HTTP routes, thin: bytes to a request, a request to a response, every error in one shape.

What enters is HTTP; what leaves is what `services.contract` describes. How a body becomes a request is in
`services.http.handler`, other shapes of the same call in `services.http.compat`, the engine behind
`services.core.service`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from services import contract, errors
from services.core.model_card import lab_version
from services.core.service import Service
from services.errors import Refusal
from services.http.access import Access
from services.http.compat import CompatRequest, add_compat_routes
from services.http.handler import ERRORS, AnyRequest, Intake, MakeWriter, post
from services.http.sse import FrameWriter, Shape

_ID_PREFIXES: dict[Shape, str] = {"completions": "cmpl-", "chat": "chatcmpl-"}


def create_app(service: Service) -> FastAPI:
    """The application around a service; starting and stopping that is the caller's business."""
    app = FastAPI(title="batching-lab", version=lab_version(), redoc_url=None)
    intake = Intake(service)
    _add_generation(app, service, intake)
    add_compat_routes(app, service, intake)
    _add_pages(app, service)
    _add_error_handlers(app, service)
    key = service.settings.api_key
    app.add_middleware(Access, api_key=None if key is None else key.get_secret_value())
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, service: Service, intake: Intake) -> None:
    def writer_of(shape: Shape, request: AnyRequest) -> MakeWriter:
        options = request.stream_options
        return lambda request_id, _: FrameWriter(
            shape,
            request_id,
            int(time.time()),
            service.model_name,
            num_choices=request.n,
            with_usage=options is not None and options.include_usage,
        )

    @app.post(**post("/generate", contract.Completion, contract.GenerateRequest))
    @app.post(**post("/v1/completions", contract.Completion, contract.GenerateRequest))
    async def generate(http: Request) -> Response:
        """Answer one or many prompts; with `stream` as server-sent events (see `StreamChunk`)."""
        return await intake.answer(
            http, contract.GenerateRequest, _ID_PREFIXES["completions"], lambda r: writer_of("completions", r)
        )

    @app.post(**post("/v1/chat/completions", contract.ChatCompletion, contract.ChatRequest))
    async def chat(http: Request) -> Response:
        """The same in the chat shape: the model's chat template makes the prompt."""
        return await intake.answer(
            http, contract.ChatRequest, _ID_PREFIXES["chat"], lambda r: writer_of("chat", r)
        )

    @app.delete("/requests/{request_id}", responses={s: ERRORS[s] for s in (401, 404)})
    async def cancel(request_id: str) -> contract.Cancelled:
        """End a request of this id at once, queued or running; its client gets what there is, as "abort"."""
        num_prompts = service.cancel(request_id)
        if not num_prompts:
            raise errors.unknown_request(request_id)
        return contract.Cancelled(request_id=request_id, num_prompts=num_prompts)


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=contract.Health, responses={503: {"model": contract.Health}})
    async def health() -> Response:
        """Never waits for the model."""
        health = service.health()
        return JSONResponse(health.model_dump(), status_code=200 if health.status == "ok" else 503)

    @app.get("/model", responses={s: ERRORS[s] for s in (401, 503)})
    async def model() -> contract.ModelCard:
        """What is loaded, how it is batched, and how many prompts to send in one request."""
        return service.model_card()

    @app.get("/v1/models", responses={s: ERRORS[s] for s in (401, 503)})
    async def models() -> contract.ModelList:
        card = service.model_card()
        entry = contract.ModelEntry(id=card.model, created=service.created, max_model_len=card.max_model_len)
        return contract.ModelList(data=[entry])

    @app.get("/metrics", response_class=Response, responses={401: ERRORS[401]})
    async def metrics() -> Response:
        """Prometheus series; empty until the model is loaded."""
        text = b"" if service.metrics is None else service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/steps", response_model=contract.Steps, responses={s: ERRORS[s] for s in (401, 422)})
    async def steps(after: Annotated[int, Query(ge=0, lt=2**63)] = 0) -> Response:
        """The engine's steps from number `after` on, 5,000 at most; `next` asks for what follows."""
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
        return answer(errors.from_failures([{**item, "loc": item["loc"][1:]} for item in error.errors()]))

    @app.exception_handler(Exception)
    async def crashed(_: Request, error: Exception) -> Response:
        return answer(Refusal(500, "The service failed; its log says why.", code="internal_error"))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The framework's schema plus the request models, whose bodies it does not parse itself."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models = schema["components"]["schemas"]
        for model in (contract.GenerateRequest, contract.ChatRequest, contract.StreamChunk, CompatRequest):
            definition = model.model_json_schema(ref_template="#/components/schemas/{model}")
            models.update(definition.pop("$defs", {}))
            models[model.__name__] = definition
        app.openapi_schema = schema
    return app.openapi_schema
