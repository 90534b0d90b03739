"""What a client may send, checked as far as that is possible without the model.

A check raises `PydanticCustomError`. The message becomes a sentence of the answer after the field's name,
so its wording is part of the contract (`services.errors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_PROMPTS = 256
MAX_PROMPT_CHARS = 1_000_000
MAX_TOKENS_LIMIT = 1_000_000
MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_CHOICES = 128
MAX_NAMED_UNKNOWN = 5
"""Of more unknown fields than this, the rest is not even looked at."""

Prompt = str | list[str] | list[int] | list[list[int]]
"""What may be sent; a request object holds a list of prompts in any case."""


def _is_int(value: object) -> bool:
    return type(value) is int


def _check_prompt(value: Any) -> Any:
    """Accepts a str, a list of str, one list of token ids or a list of such lists; always returns a list."""
    if isinstance(value, str):
        return _check_texts([value])
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "prompt", "must be a non-empty string, list of strings, list of token ids, or list of such lists"
        )
    if all(_is_int(item) for item in value):
        return [_check_token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError(
            "prompt",
            "holds {count} prompts; at most {limit} fit in one request",
            {"count": len(value), "limit": MAX_PROMPTS},
        )
    if all(isinstance(item, str) for item in value):
        return _check_texts(value)
    if all(isinstance(item, list) and all(_is_int(token) for token in item) for item in value):
        return [_check_token_ids(item) for item in value]
    raise PydanticCustomError(
        "prompt", "mixes kinds: send only strings, only token ids (integers), or only lists of token ids"
    )


def _check_texts(texts: list[str]) -> list[str]:
    if not all(texts):
        raise PydanticCustomError("prompt", "must not be empty")
    if max(map(len, texts)) > MAX_PROMPT_CHARS:
        raise PydanticCustomError("prompt", "is longer than {limit} characters", {"limit": MAX_PROMPT_CHARS})
    return texts


def _check_token_ids(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise PydanticCustomError("prompt", "must not be an empty list of token ids")
    if min(token_ids) < 0:
        raise PydanticCustomError("prompt", "token ids must not be negative")
    return token_ids


def _int_or_ints(low: int, high: int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(_is_int(number) for number in numbers):
            raise PydanticCustomError("int", "must be an integer or a list with one integer per prompt")
        if len(numbers) > MAX_PROMPTS:
            raise PydanticCustomError("int", "must hold at most {limit} numbers", {"limit": MAX_PROMPTS})
        if min(numbers) < low or max(numbers) > high:
            raise PydanticCustomError("int", "must be from {low} to {high}", {"low": low, "high": high})
        return value

    return check


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", "must hold at most {limit} strings", {"limit": MAX_STOP_STRINGS})
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError("stop", "strings have 1 to {limit} characters", {"limit": MAX_STOP_CHARS})
    return tuple(stops)


def _check_stop_token_ids(value: Any) -> Any:
    if not isinstance(value, list) or not all(_is_int(token) and token >= 0 for token in value):
        raise PydanticCustomError("stop", "must be a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise PydanticCustomError("stop", "must hold at most {limit} ids", {"limit": MAX_STOP_TOKEN_IDS})
    return tuple(value)


def _only(*neutral: object) -> AfterValidator:
    """For a field that would change the answer and is not supported: only values without effect pass."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(item) and value == item for item in neutral):
            raise PydanticCustomError(
                "unsupported",
                "is not supported by this service; leave it out{neutral}",
                {"neutral": " or send " + " or ".join(map(repr, neutral)) if neutral else ""},
            )
        return value

    return AfterValidator(check)


def _without_nulls(value: Any) -> Any:
    """A field that is null counts as left out, here as in the request itself."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class StreamOptions(BaseModel):
    """`include_obfuscation` would add padding to frames; there is none here, so it changes nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With `include_usage`: every chunk says the usage so far."""
    include_obfuscation: bool = False

    _nulls = model_validator(mode="before")(_without_nulls)


_OFF = {"top_k": -1, "seed": -1}
"""What clients of other servers send for "not given"."""


class SamplingFields(BaseModel):
    """What completions and chat requests have in common. A field that is null counts as left out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    other_names: ClassVar[dict[str, str]] = {"max_new_tokens": "max_tokens"}

    model: Annotated[str, Field(min_length=1)] | None = None
    max_tokens: Annotated[int | list[int] | None, BeforeValidator(_int_or_ints(1, MAX_TOKENS_LIMIT))] = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int | list[int] | None, BeforeValidator(_int_or_ints(0, MAX_SEED))] = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_check_stop)] = ()
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_check_stop_token_ids)] = ()
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)] = 0
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    """Adds `prompt_token_ids` to the answer; its own `token_ids` are there in any case."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=0, le=2)] = 1
    request_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None

    user: Any = None
    """A text names the client, for the order `vtc`."""
    expected_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS_LIMIT)] | None = None
    """How long each answer is expected to be, for orders that predict lengths."""
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    best_of: Annotated[Any, _only(1)] = None
    logit_bias: Annotated[Any, _only({})] = None
    include_stop_str_in_output: Annotated[Any, _only(False)] = None
    spaces_between_special_tokens: Annotated[Any, _only(True)] = None
    use_beam_search: Annotated[Any, _only(False)] = None
    length_penalty: Annotated[Any, _only(1.0, 1)] = None
    prompt_logprobs: Annotated[Any, _only(False)] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None

    @model_validator(mode="before")
    @classmethod
    def _plain_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise PydanticCustomError("body", "The body must be a JSON object.")
        known = cls.model_fields
        plain: dict[str, Any] = {}
        num_unknown = 0
        for sent, value in data.items():
            name = cls.other_names.get(sent, str(sent))
            if value is None or (_is_int(value) and value == _OFF.get(name)):
                continue
            if name not in known:
                num_unknown += 1
                if num_unknown > MAX_NAMED_UNKNOWN:
                    continue
            if name in plain and not (type(plain[name]) is type(value) and plain[name] == value):
                raise PydanticCustomError(
                    "twice",
                    "{param} is given under two names with different values; send one of them",
                    {"param": name},
                )
            plain[name] = value
        return plain


MAX_LOGPROBS = 20


def _false_is_off(value: Any) -> Any:
    return None if value is False else value


class GenerateRequest(SamplingFields):
    """`POST /generate` and `POST /v1/completions`. Lists in `max_tokens` and `seed` go by prompt.

    With `n` above 1 each prompt has that many choices side by side, `index` counting through all of them.
    """

    other_names: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_tokens",
        "max_completion_tokens": "max_tokens",
        "prompts": "prompt",
    }

    prompt: Annotated[
        list[str] | list[list[int]], BeforeValidator(_check_prompt, json_schema_input_type=Prompt)
    ]
    chat: bool = False
    """Each prompt is the message of a user, which goes into the model's chat template."""
    echo: bool = False
    add_special_tokens: bool = True
    """False: the prompt does not begin with the token that the model wants first."""
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_false_is_off)] = None
    """The logprob of each token, and so many of the likeliest beside it."""
    suffix: Annotated[Any, _only("")] = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def _join_text_parts(value: Any) -> Any:
    """A list of parts of the type text is their text; anything else is left to the field's own check."""
    is_text = isinstance(value, list) and value and all(_is_text_part(part) for part in value)
    return "".join(part["text"] for part in value) if is_text else value


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, dict)
        and _without_nulls(part).keys() - {"cache_control"} == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str, Field(max_length=MAX_PROMPT_CHARS), BeforeValidator(_join_text_parts)]
    name: str | None = None
    tool_calls: Annotated[Any, _only([])] = None
    annotations: Annotated[Any, _only([])] = None

    _nulls = model_validator(mode="before")(_without_nulls)


def _check_template_kwargs(value: dict[str, Any]) -> dict[str, Any]:
    """What the service gives the template itself is refused under its own name."""
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in value:
            raise PydanticCustomError("kwargs", "must not hold {name}", {"name": name})
    return value


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`: text messages only, no tools."""

    other_names: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_tokens",
        "max_completion_tokens": "max_tokens",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_check_template_kwargs)] = {}
    add_generation_prompt: Annotated[Any, _only(True)] = None
    continue_final_message: Annotated[Any, _only(False)] = None
    add_special_tokens: Annotated[Any, _only(False)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none")] = None
    parallel_tool_calls: Any = None
    modalities: Annotated[Any, _only(["text"])] = None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
