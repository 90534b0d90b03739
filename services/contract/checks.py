"""Checks of single fields, and the limits that they hold.

A check raises `PydanticCustomError`. The message becomes a sentence of the answer after the field's name,
so its wording is part of the contract (`services.errors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import AfterValidator
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


def is_int(value: object) -> bool:
    return type(value) is int


def check_prompt(value: Any) -> Any:
    """Accepts a str, a list of str, one list of token ids or a list of such lists; always returns a list."""
    if isinstance(value, str):
        return _check_texts([value])
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "prompt", "must be a non-empty string, list of strings, list of token ids, or list of such lists"
        )
    if all(is_int(item) for item in value):
        return [_check_token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError(
            "prompt",
            "holds {count} prompts; at most {limit} fit in one request",
            {"count": len(value), "limit": MAX_PROMPTS},
        )
    if all(isinstance(item, str) for item in value):
        return _check_texts(value)
    if all(isinstance(item, list) and all(is_int(token) for token in item) for item in value):
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


def int_or_ints(low: int, high: int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(is_int(number) for number in numbers):
            raise PydanticCustomError("int", "must be an integer or a list with one integer per prompt")
        if len(numbers) > MAX_PROMPTS:
            raise PydanticCustomError("int", "must hold at most {limit} numbers", {"limit": MAX_PROMPTS})
        if min(numbers) < low or max(numbers) > high:
            raise PydanticCustomError("int", "must be from {low} to {high}", {"low": low, "high": high})
        return value

    return check


def check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", "must hold at most {limit} strings", {"limit": MAX_STOP_STRINGS})
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError("stop", "strings have 1 to {limit} characters", {"limit": MAX_STOP_CHARS})
    return tuple(stops)


def check_stop_token_ids(value: Any) -> Any:
    if not isinstance(value, list) or not all(is_int(token) and token >= 0 for token in value):
        raise PydanticCustomError("stop", "must be a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise PydanticCustomError("stop", "must hold at most {limit} ids", {"limit": MAX_STOP_TOKEN_IDS})
    return tuple(value)


def only(*neutral: object) -> AfterValidator:
    """For a field that would change the answer and is not supported: only values without effect pass."""

    def check(value: Any) -> Any:
        sent = without_nulls(value)
        if not any(type(sent) is type(item) and sent == item for item in neutral):
            raise PydanticCustomError(
                "unsupported",
                "is not supported by this service; leave it out{neutral}",
                {"neutral": " or send " + " or ".join(map(repr, neutral)) if neutral else ""},
            )
        return value

    return AfterValidator(check)


def without_nulls(value: Any) -> Any:
    """A field that is null counts as left out, here as in the request itself."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def says_nothing(value: Any) -> bool:
    """Null, or lists and objects that hold nothing else: what a client's dump of a message has in fields of
    which it made no use."""
    inner = value.values() if isinstance(value, dict) else value
    return value is None or (isinstance(value, dict | list) and all(map(says_nothing, inner)))
