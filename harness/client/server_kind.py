"""Which server of others answers, by what it says of itself. Where none of the rules holds, it stays unknown.

The listing of models, which is asked anyway, names most of them in `owned_by`. Pages that only one kind has
are asked where it does not, and for the version.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from adapters.text.unicode_text import printable

Call = Literal["completions", "chat"]
ReadPage = Callable[[str], Any]
"""Takes a path such as /version: decoded JSON, text where it is none, None where nothing is to be had."""
_MAX_VERSION_CHARACTERS = 60
_NUMBERS = re.compile(r"\d{1,9}(\.\d{1,9})*")


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda page: isinstance(page, dict) and all(name in page for name in names)


@dataclass(frozen=True, slots=True)
class ServerKind:
    """One kind of server and how it is told."""

    name: str
    version_pages: tuple[str, ...]
    owned_by: str | None = None
    """Of each entry in its listing of models; None where the owner of the model stands there."""
    own_page: str = ""
    is_own_page: Callable[[Any], bool] | None = None
    """Holds for what stands at `own_page` of this kind, and of no other."""
    version_key: str = "version"
    token_ids_of: tuple[Call, ...] = ()
    """The streamed calls that take `return_token_ids`."""
    token_ids_since: tuple[int, ...] = ()
    """The version that brought it, where older ones may refuse it."""


# Each with the place in its project's source that says so.
KINDS = (
    # vllm/entrypoints/serve/engine/protocol.py, serve/instrumentator/basic.py; ids: openai/*/serving.py,
    # pull request 22587
    ServerKind(
        "vLLM", ("/version",), "vllm", token_ids_of=("completions", "chat"), token_ids_since=(0, 10, 2)
    ),
    # python/sglang/srt/entrypoints/openai/protocol.py, http_server.py. Its chat refuses ids of a stream;
    # versions before the field pass over it.
    ServerKind(
        "SGLang",
        ("/server_info", "/get_server_info"),  # the second is the older name
        "sglang",
        "/server_info",
        _has("internal_states", "version"),
        token_ids_of=("completions",),
    ),
    # llama.cpp: tools/server/server-context.cpp
    ServerKind(
        "llama-server",
        ("/props",),
        "llamacpp",
        "/props",
        _has("default_generation_settings", "build_info"),
        "build_info",
    ),
    # tensorrt_llm/serve/openai_protocol.py, openai_server.py. It refuses fields that it does not know.
    ServerKind("TensorRT-LLM", ("/version",), "tensorrt_llm"),
    # OpenVINO Model Server: src/http_rest_api_handler.cpp, src/version.hpp
    ServerKind(
        "OpenVINO Model Server",
        ("/v2",),
        "OVMS",
        "/v2",
        lambda page: isinstance(page, dict) and page.get("name") == "OpenVINO Model Server",
    ),
    # text-generation-inference: router/src/server.rs, lib.rs
    ServerKind(
        "TGI", ("/info",), None, "/info", _has("model_id", "max_total_tokens", "max_concurrent_requests")
    ),
    # ollama: server/routes.go, openai/openai.go
    ServerKind(
        "Ollama",
        ("/api/version",),
        None,
        "/",
        lambda page: isinstance(page, str) and page.strip() == "Ollama is running",
    ),
)


@dataclass(frozen=True, slots=True)
class FoundKind:
    """A kind that was recognised, and the version where it told one."""

    kind: ServerKind
    version: str | None

    @property
    def token_ids_of(self) -> tuple[Call, ...]:
        """The calls that may be asked for token ids."""
        since, numbers = self.kind.token_ids_since, _NUMBERS.match(self.version or "")
        if since and (numbers is None or tuple(map(int, numbers[0].split("."))) < since):
            return ()
        return self.kind.token_ids_of


def find_kind(listing: Any, read: ReadPage) -> FoundKind | None:
    """Recognise a server by its listing of models (decoded JSON, or None) and by what `read` gets."""
    pages: dict[str, Any] = {}

    def page(path: str) -> Any:
        if path not in pages:
            pages[path] = read(path)
        return pages[path]

    owner = first_listed(listing, "owned_by")
    by_owner = (kind for kind in KINDS if owner and kind.owned_by == owner)
    by_page = (kind for kind in KINDS if kind.is_own_page and kind.is_own_page(page(kind.own_page)))
    kind = next(by_owner, None) or next(by_page, None)
    if kind is None:
        return None
    told = (_version(page(path), kind.version_key) for path in kind.version_pages)
    return FoundKind(kind, next((version for version in told if version), None))


def first_listed(listing: Any, key: str) -> str | None:
    """What the first entry of a listing of models says; None where it says nothing, or there is none."""
    try:
        told = listing["data"][0][key]
    except (KeyError, IndexError, TypeError):
        return None
    return told if isinstance(told, str) else None


def _version(page: Any, key: str) -> str | None:
    version = page.get(key) if isinstance(page, dict) else None
    return printable(version)[:_MAX_VERSION_CHARACTERS] if isinstance(version, str) and version else None
