"""Prompts as token ids and back, as vLLM's `/tokenize` and `/detokenize` have it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Tokens(BaseModel):
    """`POST /tokenize`, whose body is that of a completion or a chat: the ids of its prompt."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    model: Annotated[str, Field(min_length=1)] | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class Detokenized(BaseModel):
    """Special tokens are spelled out."""

    prompt: str
