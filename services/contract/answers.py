"""What a client gets back for a prompt, whole, streamed or as an error.

The service writes stream frames without building these models; `StreamChunk` says what they must parse to.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "abort", "error"]


class Timings(BaseModel):
    """`batch_wait_s`: slot and KV were free but the strategy held back; `queue_s`: the rest of the wait.

    The last three are instants on the server's monotonic clock, which a client on the same machine shares:
    when the request came, when its first token was computed, and when that was taken to be written.
    """

    queue_s: float
    batch_wait_s: float
    prefill_s: float
    decode_s: float
    num_steps: int
    mean_batch_size: float
    received_s: float | None = None
    first_token_s: float | None = None
    first_write_s: float | None = None


class StreamChoice(BaseModel):
    """News of one prompt. The last three come with its finishing entry only."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    timings: Timings | None = None


class CompletionChoice(BaseModel):
    """One prompt's answer. `text` ends before a stop string, `token_ids` with the token that completes it."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    timings: Timings


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StreamChunk(BaseModel):
    """One frame of a stream. `choices` is empty in the usage frame only."""

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


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error answer, and the last frame of a stream that failed."""

    error: ErrorDetail


class Cancelled(BaseModel):
    """`DELETE /requests/{id}`: their answers end with `finish_reason` "abort" and what they had."""

    request_id: str
    num_prompts: int
