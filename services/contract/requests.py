"""What a client may send, checked as far as that is possible without the model."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from services.contract.checks import (
    MAX_CHOICES,
    MAX_NAMED_UNKNOWN,
    MAX_PROMPT_CHARS,
    MAX_PROMPTS,
    MAX_SEED,
    MAX_TOKENS_LIMIT,
    Prompt,
    check_prompt,
    check_stop,
    check_stop_token_ids,
    int_or_ints,
    is_int,
    only,
    says_nothing,
    without_nulls,
)


class StreamOptions(BaseModel):
    """`include_obfuscation` would add padding to frames; there is none here, so it changes nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With `include_usage`: every chunk says the usage so far."""
    include_obfuscation: bool = False

    _nulls = model_validator(mode="before")(without_nulls)


DEFAULT_PRIORITY = 1
_OFF = {"top_k": -1, "seed": -1}
"""What clients of other servers send for "not given"."""


class SamplingFields(BaseModel):
    """What completions and chat requests have in common. A field that is null counts as left out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    other_names: ClassVar[dict[str, str]] = {"max_new_tokens": "max_tokens"}

    model: Annotated[str, Field(min_length=1)] | None = None
    max_tokens: Annotated[int | list[int] | None, BeforeValidator(int_or_ints(1, MAX_TOKENS_LIMIT))] = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int | list[int] | None, BeforeValidator(int_or_ints(0, MAX_SEED))] = None
    stop: Annotated[tuple[str, ...], BeforeValidator(check_stop)] = ()
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(check_stop_token_ids)] = ()
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)] = 0
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    """Adds `prompt_token_ids` to the answer; its own `token_ids` are there in any case."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=0, le=2)] = DEFAULT_PRIORITY
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

    best_of: Annotated[Any, only(1)] = None
    logit_bias: Annotated[Any, only({})] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1.0, 1)] = None
    prompt_logprobs: Annotated[Any, only(False)] = None
    response_format: Annotated[Any, only({"type": "text"})] = None

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
            if value is None or (is_int(value) and value == _OFF.get(name)):
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


def _join_text_parts(value: Any) -> Any:
    """A list of parts of the type text is their text; anything else is left to the field's own check."""
    is_text = isinstance(value, list) and value and all(_is_text_part(part) for part in value)
    return "".join(part["text"] for part in value) if is_text else value


def _what_is_said(message: Any) -> Any:
    return {k: v for k, v in message.items() if not says_nothing(v)} if isinstance(message, dict) else message


def _message_said(message: Any) -> Any:
    """An assistant that said nothing has no content in some clients' dumps."""
    said = _what_is_said(message)
    is_silent = isinstance(said, dict) and said.get("role") == "assistant" and "content" not in said
    return {**said, "content": ""} if is_silent else said


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, dict)
        and _what_is_said(part).keys() - {"cache_control"} == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str, Field(max_length=MAX_PROMPT_CHARS), BeforeValidator(_join_text_parts)]
    name: str | None = None
    tool_calls: Annotated[Any, only()] = None
    annotations: Annotated[Any, only()] = None
    cache_control: Any = None

    _said = model_validator(mode="before")(_message_said)

    @property
    def for_template(self) -> dict[str, object]:
        """What a model's chat template reads."""
        return self.model_dump(include={"role", "content", "name"}, exclude_none=True)


Chat = Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]


def _list_of_chats(value: Any) -> Any:
    """One chat is a list of one."""
    is_one = isinstance(value, list) and value and not any(isinstance(item, list) for item in value)
    return [value] if is_one else value


class GenerateRequest(SamplingFields):
    """`POST /generate` and `POST /v1/completions`. Lists in `max_tokens` and `seed` go by prompt.

    It has either `prompt` or `messages`. With `n` above 1 each prompt has that many choices side by side,
    `index` counting through all of them.
    """

    other_names: ClassVar[dict[str, str]] = {
        "max_new_tokens": "max_tokens",
        "max_completion_tokens": "max_tokens",
        "prompts": "prompt",
    }

    prompt: Annotated[
        list[str] | list[list[int]], BeforeValidator(check_prompt, json_schema_input_type=Prompt)
    ] = []
    messages: Annotated[
        list[Chat],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_list_of_chats, json_schema_input_type=Chat | list[Chat]),
    ] = []
    """One chat, or a list of them, in the place of prompts."""
    chat: bool = False
    """Each prompt is the message of a user, which goes into the model's chat template."""
    echo: bool = False
    add_special_tokens: bool = True
    """False: the prompt does not begin with the token that the model wants first."""
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_false_is_off)] = None
    """The logprob of each token, and so many of the likeliest beside it."""
    suffix: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> GenerateRequest:
        if not self.prompt and not self.messages:
            raise PydanticCustomError("missing", "is required", {"param": "prompt"})
        if self.prompt and self.messages:
            problem = "takes the place of prompt: send one of them"
            raise PydanticCustomError("one_of", problem, {"param": "messages"})
        if self.messages and self.echo:
            raise PydanticCustomError("one_of", "repeats a prompt, not messages", {"param": "echo"})
        return self

    @property
    def num_prompts(self) -> int:
        return len(self.prompt) or len(self.messages)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


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

    messages: Chat
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_check_template_kwargs)] = {}
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    add_special_tokens: Annotated[Any, only(False)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none")] = None
    parallel_tool_calls: Any = None
    modalities: Annotated[Any, only(["text"])] = None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
