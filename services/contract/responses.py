"""What a client gets back for a prompt, whole, streamed or as an error.

The service writes answers without building these models. The models say what the bytes must parse to.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from services.contract.timings import SequenceTimings

FinishReason = Literal["stop", "length", "abort", "error"]


class Timings(BaseModel, SequenceTimings, frozen=True):
    """`SequenceTimings` as JSON.

    `batch_wait_s`: slot and KV were free, or kept by finished rows, but the strategy held back; `queue_s`:
    the rest of the wait.
    The last three are instants on the server's monotonic clock: when the request came, when its first token
    was computed, and when that was taken to be written.
    """


class Logprobs(BaseModel):
    """Of the tokens of a completion. `text_offset` counts the whole characters of the tokens before each."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TokenLogprob(BaseModel):
    """A part of a character is spelled `bytes:\\xe2\\x82`; `bytes` is null where they are not known."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]


class StreamChoice(BaseModel):
    """What one choice gained. Its last entry alone carries the counts and the timings, its first the prompt's
    ids where `return_token_ids` asks for them."""

    index: int
    text: str
    prompt_token_ids: list[int] | None = None
    token_ids: list[int]
    finish_reason: FinishReason | None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    timings: Timings | None = None
    logprobs: Logprobs | None = None


class CompletionChoice(BaseModel):
    """One prompt's answer. `text` ends before a stop string, `token_ids` with the token that completes it."""

    index: int
    text: str
    prompt_token_ids: list[int] | None = None
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    timings: Timings
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StreamChunk(BaseModel):
    """One frame of a stream. `choices` is empty in the usage frame only; others have a `usage`, the one so
    far, where `continuous_usage_stats` asks for it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[StreamChoice]
    usage: Usage | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatReply(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatReply
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    timings: Timings
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class Version(BaseModel):
    version: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error answer, and the last frame of a stream that failed."""

    error: ErrorDetail


class Cancelled(BaseModel):
    """`DELETE /requests/{id}`. The answers end with `finish_reason` "abort" and the tokens so far."""

    request_id: str
    num_prompts: int
