"""The HTTP routes, and the handlers that put every error into one shape.

The docstrings of the routes are what `/docs` shows.
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

from services import errors
from services.contract.requests import ChatRequest, GenerateRequest
from services.contract.responses import Cancelled, ChatCompletion, Completion, StreamChunk, Version
from services.contract.status import Health, ModelCard, ModelEntry, ModelList, Steps
from services.contract.tokens import DetokenizeRequest
from services.core.model_card import lab_version
from services.core.service import Service
from services.errors import ApiError
from services.http.access import Access
from services.http.compat import CompatRequest, add_compat_routes
from services.http.handler import ERRORS, AnyRequest, MakeWriter, RequestHandler, post
from services.http.sse import FrameWriter, Shape

_ID_PREFIXES: dict[Shape, str] = {"completions": "cmpl-", "chat": "chatcmpl-"}


def create_app(service: Service) -> FastAPI:
    """The application around a service; starting and stopping that is the caller's business."""
    # A redirect would name the host that the request named, which need not be ours.
    app = FastAPI(title="batching-lab", version=lab_version(), redoc_url=None, redirect_slashes=False)
    handler = RequestHandler(service)
    _add_generation(app, service, handler)
    add_compat_routes(app, service, handler)
    _add_pages(app, service)
    _add_error_handlers(app, service)
    key = service.settings.api_key
    app.add_middleware(
        Access,
        api_key=None if key is None else key.get_secret_value(),
        on_refused=service.metrics.request_rejected,
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, service: Service, handler: RequestHandler) -> None:
    def writer_of(shape: Shape, request: AnyRequest) -> MakeWriter:
        options = request.stream_options
        with_usage = options is not None and options.include_usage
        is_continuous = with_usage and options is not None and options.continuous_usage_stats
        return lambda state: FrameWriter(
            shape,
            state.request_id,
            int(time.time()),
            service.model_name,
            num_choices=request.n,
            with_usage=with_usage,
            usage_prompt_tokens=state.num_prompt_tokens // request.n if is_continuous else None,
            prompt_token_ids=state.prompt_token_ids,
            spelled=state.spelled,
        )

    @app.post(**post("/generate", Completion, GenerateRequest))
    @app.post(**post("/v1/completions", Completion, GenerateRequest))
    async def generate(http: Request) -> Response:
        """Answer one or many prompts; with `stream` as server-sent events (see `StreamChunk`)."""
        return await handler.answer(
            http, GenerateRequest, _ID_PREFIXES["completions"], lambda r: writer_of("completions", r)
        )

    @app.post(**post("/v1/chat/completions", ChatCompletion, ChatRequest))
    async def chat(http: Request) -> Response:
        """The same in the chat shape: the model's chat template makes the prompt."""
        return await handler.answer(http, ChatRequest, _ID_PREFIXES["chat"], lambda r: writer_of("chat", r))

    @app.delete("/requests/{request_id:path}", responses={s: ERRORS[s] for s in (401, 404)})
    async def cancel(request_id: str) -> Cancelled:
        """End a request of this id at once, queued or running; its client gets what there is, as "abort"."""
        num_prompts = service.cancel(request_id)
        if not num_prompts:
            raise errors.unknown_request(request_id)
        return Cancelled(request_id=request_id, num_prompts=num_prompts)


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Never waits for the model."""
        health = service.health()
        return JSONResponse(health.model_dump(), status_code=200 if health.status == "ok" else 503)

    @app.get("/model", responses={s: ERRORS[s] for s in (401, 503)})
    async def model() -> ModelCard:
        """What is loaded, how it is batched, and how many prompts to send in one request."""
        return service.model_card()

    @app.get("/v1/models", responses={s: ERRORS[s] for s in (401, 503)})
    async def models() -> ModelList:
        card = service.model_card()
        entry = ModelEntry(id=card.model, created=service.created, max_model_len=card.max_model_len)
        return ModelList(data=[entry])

    @app.get("/v1/models/{model_id:path}", responses={s: ERRORS[s] for s in (401, 404, 503)})
    async def one_model(model_id: str) -> ModelEntry:
        (entry,) = (await models()).data
        if model_id not in (entry.id, service.settings.model):
            raise errors.unknown_model(model_id, entry.id)
        return entry

    @app.get("/version", responses={401: ERRORS[401]})
    async def version() -> Version:
        return Version(version=lab_version())

    @app.get("/metrics", response_class=Response, responses={401: ERRORS[401]})
    async def metrics(http: Request) -> Response:
        """Prometheus series; as OpenMetrics, with exemplars, where that is accepted."""
        text, media_type = service.metrics_page(http.headers.get("accept", ""))
        return Response(text, headers={"content-type": media_type})

    @app.get("/steps", response_model=Steps, responses={s: ERRORS[s] for s in (401, 422)})
    async def steps(after: Annotated[int, Query(ge=0, lt=2**63)] = 0) -> Response:
        """The engine's steps from number `after` on, 5,000 at most; `next` asks for what follows."""
        return Response(service.steps.page(after), media_type="application/json")


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    def answer(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
        return JSONResponse(error.body, error.status, headers={**error.headers, **(headers or {})})

    def refuse(error: ApiError) -> Response:
        service.metrics.request_rejected(error.code)
        return answer(error)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return refuse(error)

    @app.exception_handler(HTTPException)
    async def no_route(http: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        message = f"{http.method} {http.url.path}: {status.phrase.lower()}."
        return answer(ApiError(status, message, code=status.name.lower()), error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_query(_: Request, error: RequestValidationError) -> Response:
        return refuse(errors.from_failures([{**item, "loc": item["loc"][1:]} for item in error.errors()]))

    @app.exception_handler(Exception)
    async def crashed(_: Request, __: Exception) -> Response:
        return refuse(ApiError(500, "The service failed; its log says why.", code="internal_error"))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The framework's schema plus the request models, whose bodies it does not parse itself."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        models = schema["components"]["schemas"]
        for model in (GenerateRequest, ChatRequest, StreamChunk, CompatRequest, DetokenizeRequest):
            definition = model.model_json_schema(ref_template="#/components/schemas/{model}")
            models.update(definition.pop("$defs", {}))
            models[model.__name__] = definition
        app.openapi_schema = schema
    return app.openapi_schema
