"""Every error that a client can get, in one shape: `{"error": {message, type, param, code}}`.

Messages, codes and statuses are part of the wire contract. An error in mid-stream is sent as the last frame.

400 a body that is not JSON, or a request that can never fit; 401 the API key; 404 a model that is not
loaded, or an id that is not in flight; 408, 413, 415 a body that is too slow, too large or compressed; 422 a
field; 429 the queue is full; 431 headers that are too large; 500 the backend failed; 503 starting, draining
or the engine was lost; 504 out of time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_FIELD_CODES = {
    "missing": "missing_field",
    "extra_forbidden": "unknown_field",
    "unsupported": "unsupported_field",
}
REASONS = (
    *("invalid_json", "invalid_value", *_FIELD_CODES.values(), "unsupported_encoding", "body_too_large"),
    *("body_too_slow", "context_length_exceeded", "model_not_found", "request_not_found", "queue_full"),
    *("invalid_api_key", "invalid_http", "headers_too_large", "headers_too_slow", "too_many_pipelined"),
    "chunks_too_small",
    *("too_many_connections", "starting", "restarting", "draining", "engine_lost", "engine_lost_twice"),
    *("backend_failed", "backend_not_loaded", "internal_error", "slow_reader", "timeout"),
)
"""Every code of an error that a request may get, but for a path or a method that does not exist."""
_MAX_NAMED = 5
_SHOWN_CHARS = 40


class ApiError(Exception):
    """Why a request gets no answer, or no more of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        error_type = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": error_type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def json_bytes(self) -> bytes:
        return json.dumps(self.body, separators=(",", ":")).encode()

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def not_json(detail: str) -> ApiError:
    return ApiError(400, f"The body is not valid JSON: {detail}.", code="invalid_json")


def body_too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes} bytes.", code="body_too_large")


def body_encoded(encoding: str) -> ApiError:
    message = f"The body's Content-Encoding is {encoding[:_SHOWN_CHARS]!r}; send it as it is."
    return ApiError(415, message, code="unsupported_encoding")


def too_many_values(strings: int, containers: int, values: int) -> ApiError:
    message = (
        f"The body holds more than {strings} strings, {containers} lists and objects, or {values} values."
    )
    return ApiError(413, message, code="body_too_large")


def bad_field(param: str, problem: str) -> ApiError:
    """`problem` completes a sentence that begins with the field's name."""
    return ApiError(422, f"{param} {problem.rstrip('.')}.", code="invalid_value", param=param)


def unsupported_field(param: str, problem: str) -> ApiError:
    """As `bad_field`, for what this service, or its backend, cannot do."""
    return ApiError(422, f"{param} {problem}.", code="unsupported_field", param=param)


def cannot_run_alone() -> ApiError:
    message = "This path runs a prompt alone, which SCHEDULING=engine cannot do."
    return ApiError(422, message, code="unsupported_field")


def too_long(problem: str, param: str) -> ApiError:
    return ApiError(400, f"This can never fit: {problem}.", code="context_length_exceeded", param=param)


def unknown_model(asked: str, loaded: str) -> ApiError:
    message = f"The model {asked!r} is not loaded here; {loaded!r} is."
    return ApiError(404, message, code="model_not_found", param="model")


def queue_full(max_queue: int, retry_after_s: int) -> ApiError:
    message = f"The queue is full ({max_queue} requests wait); try again in {retry_after_s} s."
    return ApiError(429, message, code="queue_full", retry_after_s=retry_after_s)


def queue_prompts_full(max_queue: int, retry_after_s: int) -> ApiError:
    message = f"The queue is full ({max_queue} prompts may wait); try again in {retry_after_s} s."
    return ApiError(429, message, code="queue_full", retry_after_s=retry_after_s)


def queue_tokens_full(max_tokens: int, retry_after_s: int) -> ApiError:
    message = f"The queue is full ({max_tokens} prompt tokens may wait); try again in {retry_after_s} s."
    return ApiError(429, message, code="queue_full", retry_after_s=retry_after_s)


def too_many_bytes() -> ApiError:
    message = "Too many bytes of other requests wait to be read; try again in 1 s."
    return ApiError(429, message, code="queue_full", retry_after_s=1)


def chats_wait() -> ApiError:
    message = "Too many chats wait for the model's chat template; try again in 1 s."
    return ApiError(429, message, code="queue_full", retry_after_s=1)


def starting() -> ApiError:
    return ApiError(503, "The model is still loading; try again soon.", code="starting", retry_after_s=1)


def restarting() -> ApiError:
    return ApiError(503, "The engine stopped and is being restarted.", code="restarting", retry_after_s=1)


def draining() -> ApiError:
    return ApiError(503, "The service is shutting down and takes no more requests.", code="draining")


def engine_lost(detail: str) -> ApiError:
    return ApiError(503, f"The engine stopped while it worked on this request: {detail}.", code="engine_lost")


def lost_twice(seconds: float) -> ApiError:
    message = (
        "The engine stopped twice in a row while it worked on this request, so it is refused for "
        f"{seconds:.0f} s; the log of the service says why the engine stopped."
    )
    return ApiError(503, message, code="engine_lost_twice", retry_after_s=math.ceil(seconds))


def drain_timed_out(timeout_s: float) -> ApiError:
    message = f"The service shut down before this request was finished (after {timeout_s:g} s)."
    return ApiError(503, message, code="draining")


def backend_failed(detail: str) -> ApiError:
    return ApiError(500, f"This request could not be computed: {detail}.", code="backend_failed")


def timed_out(timeout_s: float) -> ApiError:
    message = f"The request did not finish within its time, {timeout_s:g} s (timeout_s, or MAX_TIMEOUT_S)."
    return ApiError(504, message, code="timeout", param="timeout_s")


def slow_reader(what: str) -> ApiError:
    """The client does not read, so this is counted and seldom seen."""
    return ApiError(503, f"The client was cut off because it {what}.", code="slow_reader")


def body_too_slow(timeout_s: float) -> ApiError:
    message = f"The body did not arrive within {timeout_s:g} s."
    return ApiError(408, message, code="body_too_slow")


def not_http() -> ApiError:
    return ApiError(400, "This is no HTTP/1.1 request.", code="invalid_http")


def head_too_large(max_bytes: int, max_headers: int) -> ApiError:
    message = f"The request line and headers are more than {max_bytes} bytes, or than {max_headers} headers."
    return ApiError(431, message, code="headers_too_large")


def framing_too_large() -> ApiError:
    message = "The body comes in pieces that are far smaller than what surrounds them: send larger chunks."
    return ApiError(400, message, code="chunks_too_small")


def head_too_slow(timeout_s: float) -> ApiError:
    message = f"The request line and headers did not arrive within {timeout_s:g} s."
    return ApiError(408, message, code="headers_too_slow")


def too_many_pipelined(most: int) -> ApiError:
    message = f"More than {most} requests of one connection wait for their turn; read the answers first."
    return ApiError(400, message, code="too_many_pipelined")


def too_many_connections() -> ApiError:
    message = "All connections that this service may have are in use; try again in 1 s."
    return ApiError(503, message, code="too_many_connections", retry_after_s=1)


def unauthorized() -> ApiError:
    message = "This service wants its API key, as the header `Authorization: Bearer KEY`."
    return ApiError(401, message, code="invalid_api_key")


def unknown_request(request_id: str) -> ApiError:
    message = f"No request with the id {request_id!r} is in flight."
    return ApiError(404, message, code="request_not_found", param="request_id")


def from_validation(error: ValidationError) -> ApiError:
    return from_failures(error.errors(include_url=False))


def from_failures(failures: Sequence[Any]) -> ApiError:
    """The first failed field decides `param` and `code`; the message tells of up to five of them."""
    sentences = [_describe(_param(failure), failure) for failure in failures[:_MAX_NAMED]]
    first = failures[0]
    code = _FIELD_CODES.get(first["type"], "invalid_value")
    return ApiError(422, " ".join(sentences), code=code, param=_param(first))


def _param(failure: Any) -> str | None:
    if failure["loc"]:
        return ".".join(str(part) for part in failure["loc"])
    param = failure.get("ctx", {}).get("param")
    return None if param is None else str(param)


def _describe(param: str | None, failure: Any) -> str:
    message: str = failure["msg"]
    match failure["type"]:
        case "missing":
            return f"{param} is required."
        case "extra_forbidden":
            return f"{param} is not a known field."
        case "string_pattern_mismatch":
            return f"{param} may hold printable ASCII characters only, without spaces."
        case "body" | "twice":
            return message.rstrip(".") + "."
    if message.startswith("Input should be "):
        message = "must be " + message.removeprefix("Input should be ")
    elif " should " in message:
        message = "must " + message.split(" should ", 1)[1]
    message = message.replace(" after validation", "")
    return f"{param} {message}{_got(failure['input'])}."


def _got(value: object) -> str:
    """What was sent, where that is short enough to help."""
    if value is None or isinstance(value, list | tuple | dict):
        return ""
    text = json.dumps(value, default=str)
    return f" (got {text})" if len(text) <= _SHOWN_CHARS else ""
