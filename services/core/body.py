"""From the bytes of a body to a request. What would take long to build is refused before it is built."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from services import errors

LARGE_BODY_BYTES = 65_536
MAX_STRINGS = 50_000
MAX_CONTAINERS = 20_000
MAX_VALUES = 1_000_000
"""Of a large body. As many as all prompts, messages or token ids of one request may need."""
_DEPTH = 1000
"""More than the parser follows."""

RequestT = TypeVar("RequestT", bound=BaseModel)


def parse(model: type[RequestT], body: bytes) -> RequestT:
    """Check a body against one of the request models.

    Raises:
        ApiError: as `read_json` and `check` do.
    """
    return check(model, read_json(body))


def read_json(body: bytes) -> Any:
    """Raises: ApiError: 400 for what is not JSON, 413 for too many values."""
    if len(body) > LARGE_BODY_BYTES:
        _check_structure(body)
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise errors.not_json(str(error)) from None


def check(model: type[RequestT], data: Any) -> RequestT:
    """Raises: ApiError: 422 with the field's name."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise errors.from_validation(error) from None


def _check_structure(body: bytes) -> None:
    """Refuse what would take long to build. Parsing holds the interpreter's lock: a million lists, 0.6 s.

    Raises:
        ApiError: 413.
    """
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    num_strings = plain.count(b'"') // 2
    if num_strings <= MAX_STRINGS:
        outside = b"".join(plain.split(b'"')[::2])
        num_containers, num_values = outside.count(b"[") + outside.count(b"{"), outside.count(b",") + 1
        is_too_deep = num_containers > _DEPTH * num_values  # which the parser finds at once
        if is_too_deep or (num_containers <= MAX_CONTAINERS and num_values <= MAX_VALUES):
            return
    raise errors.too_many_values(MAX_STRINGS, MAX_CONTAINERS, MAX_VALUES)
