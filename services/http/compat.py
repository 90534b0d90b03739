"""Other shapes of the same call, kept working as they are written elsewhere.

Each route turns its body into a `GenerateRequest` and writes the output in its own shape; none has a
strategy or an engine of its own. `/tokenize` and `/detokenize` need no engine at all.

`POST /v1/generate` has two known shapes. A body with `max_new_tokens`, or with nothing telling, streams
`event: ttft` with the seconds, `data:` lines with the text, and `event: done`; one with `max_tokens` or
`priority` gets one JSON object. An explicit `stream` decides.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ModelWrapValidatorHandler, PrivateAttr, model_validator
from starlette.responses import Response

from services.contract.requests import ChatRequest, GenerateRequest
from services.contract.responses import ErrorBody
from services.contract.tokens import Detokenized, DetokenizeRequest, Tokens
from services.core.body import check, read_json
from services.core.outputs import ChoiceOutput, RequestOutput, RequestState
from services.core.service import Service
from services.errors import ApiError, bad_field
from services.http.handler import AnyRequest, MakeWriter, RequestHandler, post

_PREFIX = "gen-"
_TELLS_JSON = ("max_tokens", "priority")


class CompatRequest(GenerateRequest):
    """As `GenerateRequest`; one prompt, but for `/basic_generate` and `/generate_vllm`."""

    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)
    """What the body holds itself, nulls left out."""

    @model_validator(mode="wrap")
    @classmethod
    def _keep_what_was_sent(cls, data: Any, check: ModelWrapValidatorHandler[CompatRequest]) -> CompatRequest:
        request = check(data)
        if request.logprobs is not None:
            raise bad_field("logprobs", "has no place in this path's answer: use /v1/completions")
        request._sent.update((name, value) for name, value in data.items() if value is not None)
        return request

    @property
    def tells_stream(self) -> bool:
        """Whether `/v1/generate` streams; the module says how."""
        if "stream" in self._sent:
            return self.stream
        return not any(name in self._sent for name in _TELLS_JSON)

    @property
    def is_list(self) -> bool:
        """Whether a list of prompts was sent, be it of one."""
        sent = self._sent.get("prompt", self._sent.get("prompts"))
        return isinstance(sent, list) and not isinstance(sent[0], int)


class Generated(BaseModel):
    """`/v1/generate` without a stream."""

    request_id: str
    text: str
    tokens_generated: int
    latency_ms: float
    batch_wait_ms: float


class GeneratedText(BaseModel):
    """`/v1/generate_nobatch`, and `/basic_generate` with one prompt."""

    text: str


class GeneratedTexts(BaseModel):
    """`/generate_vllm`, and `/basic_generate` with a list: one text a prompt, in order."""

    texts: list[str]


class EventWriter:
    """`event: ttft`, then text as `data:` lines, then `event: done`; as a whole, a `Generated`."""

    def __init__(self, request_id: str, arrival_s: float) -> None:
        self._request_id = request_id
        self._arrival_s = arrival_s
        self._has_begun = False

    def frame(self, output: RequestOutput) -> bytes:
        text = "".join(choice.text for choice in output)
        frames = "" if self._has_begun else f"event: ttft\ndata: {time.monotonic() - self._arrival_s:.6f}\n\n"
        self._has_begun = True
        return (frames + (_data(text) if text else "")).encode()

    def end(self, finished: Sequence[ChoiceOutput]) -> bytes:
        num_tokens = sum(choice.num_output_tokens for choice in finished)
        reason = finished[0].finish_reason
        return (
            f'event: done\ndata: {{"tokens_generated":{num_tokens},"finish_reason":"{reason}"}}\n\n'.encode()
        )

    def whole(self, output: RequestOutput) -> bytes:
        (choice,) = output
        body = Generated(
            request_id=self._request_id,
            text=choice.text,
            tokens_generated=choice.num_output_tokens,
            latency_ms=(time.monotonic() - self._arrival_s) * 1000,
            batch_wait_ms=choice.timings.batch_wait_s * 1000,
        )
        return body.model_dump_json().encode()


class TextWriter(EventWriter):
    """The same stream; as a whole, `{"text"}` alone, or `{"texts"}` with `many`."""

    def __init__(self, request_id: str, arrival_s: float, *, many: bool = False) -> None:
        super().__init__(request_id, arrival_s)
        self._many = many

    def whole(self, output: RequestOutput) -> bytes:
        texts = [choice.text for choice in output]
        body = GeneratedTexts(texts=texts) if self._many else GeneratedText(text=texts[0])
        return body.model_dump_json().encode()


def _events(request: RequestState) -> EventWriter:
    return EventWriter(request.request_id, request.arrival_s)


def _text(request: RequestState) -> TextWriter:
    return TextWriter(request.request_id, request.arrival_s)


def _texts(request: RequestState) -> TextWriter:
    return TextWriter(request.request_id, request.arrival_s, many=True)


def add_compat_routes(app: FastAPI, service: Service, handler: RequestHandler) -> None:
    async def answer(
        http: Request,
        writer: MakeWriter,
        *,
        streams: bool | None,
        writer_of_many: MakeWriter | None = None,
        exclusive: bool = False,
    ) -> Response:
        """With `streams` None the body decides. With `writer_of_many` there may be a list of prompts."""
        arrival_s = time.monotonic()
        request = await handler.read(http, CompatRequest)
        if request is None:
            return Response()
        if writer_of_many is not None and request.is_list:
            writer = writer_of_many
        elif request.num_prompts * request.n > 1:
            raise bad_field("prompt", "must be a single prompt on this path")
        if streams is None:
            streams = request.tells_stream
        elif request.stream and not streams:
            raise bad_field("stream", "is not possible on this path; use /generate")
        request = request.model_copy(update={"stream": streams})
        return await handler.respond(http, request, _PREFIX, arrival_s, writer, exclusive=exclusive)

    @app.post(**post("/v1/generate", Generated, CompatRequest))
    async def generate(http: Request) -> Response:
        """One prompt, as events or as one object."""
        return await answer(http, _events, streams=None)

    @app.post(**post("/generate_stream", Generated, CompatRequest))
    async def generate_stream(http: Request) -> Response:
        """One prompt, always as events."""
        return await answer(http, _events, streams=True)

    basic = post("/basic_generate", GeneratedText, CompatRequest, streams=False)
    basic["responses"][200]["model"] = GeneratedText | GeneratedTexts

    @app.post(**basic)
    async def basic_generate(http: Request) -> Response:
        """One prompt and its text, or a list of prompts and their texts."""
        return await answer(http, _text, streams=False, writer_of_many=_texts)

    @app.post(**post("/v1/generate_nobatch", GeneratedText, CompatRequest, streams=False))
    async def generate_nobatch(http: Request) -> Response:
        """One prompt, its text; it shares no step with another request."""
        return await answer(http, _text, streams=False, exclusive=True)

    vllm = post("/generate_vllm", GeneratedTexts, CompatRequest, streams=False)
    vllm["responses"][501] = {"model": ErrorBody}

    @app.post(**vllm)
    async def generate_vllm(http: Request) -> Response:
        """Many prompts, their texts, where the vLLM backend is the one loaded."""
        backend = service.settings.backend
        if backend != "vllm":
            message = (
                f"BACKEND={backend} is loaded, not vllm: send the same list of prompts "
                "to /generate or /v1/completions."
            )
            raise ApiError(501, message, code="backend_not_loaded")
        return await answer(http, _texts, streams=False, writer_of_many=_texts)

    @app.post(**post("/tokenize", Tokens, GenerateRequest, streams=False))
    async def tokenize(http: Request) -> Response:
        """The prompt of a completion or chat request as token ids."""
        request = await handler.read_as(http, _either)
        return Response() if request is None else _json(await service.tokenize(request))

    @app.post(**post("/detokenize", Detokenized, DetokenizeRequest, streams=False))
    async def detokenize(http: Request) -> Response:
        """The text of token ids."""
        request = await handler.read(http, DetokenizeRequest)
        return Response() if request is None else _json(await service.detokenize(request))


def _either(body: bytes) -> AnyRequest:
    data = read_json(body)
    is_chat = isinstance(data, dict) and data.get("messages") is not None
    return check(ChatRequest, data) if is_chat else check(GenerateRequest, data)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _data(text: str) -> str:
    """One event; a line break inside the text begins another `data:` line of it."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join(f"data: {line}\n" for line in lines) + "\n"
