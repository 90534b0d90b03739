"""Where requests go and the exact bytes of each of them.

Two dialects: `lab` (`/generate`, lists of budgets and seeds, counts in the finishing entry) and `openai` (any
`/v1/completions`, or `/v1/chat/completions` for a chat; usage asked for, and token ids of servers that are
known to give them). `ignore_eos`, `temperature` and `seed` are always sent. A body depends on the schedule
and the kind of server alone, so two runs of one seed send the same bytes.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from adapters.base import ConfigError
from harness.client.connection import Origin
from harness.client.server_kind import Call
from harness.plan.schedule import PlannedRequest

Dialect = Literal["lab", "openai"]
_API_VERSION = re.compile(r"/v\d+$")


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint. The key, or else the `user:password` of its URL, goes into request heads alone."""

    origin: Origin
    path: str
    dialect: Dialect = "lab"
    model: str | None = None
    temperature: float = 0.0
    api_key: str | None = field(default=None, repr=False)
    login: str | None = field(default=None, repr=False)
    ignore_eos: bool = True
    """False: the model ends its answers, and `max_tokens` is a cap."""
    token_ids_of: tuple[Call, ...] = ()
    """The calls in which the server is asked for the ids of its tokens; ours send them unasked."""

    @property
    def authorization(self) -> str | None:
        """The value of that header."""
        if self.api_key:
            return f"Bearer {self.api_key}"
        return f"Basic {b64encode(self.login.encode()).decode()}" if self.login else None

    def body(self, group: Sequence[PlannedRequest]) -> bytes:
        """The JSON body for prompts that go out together; a single prompt is sent without lists.

        Of several, the first says for whom the request is, and how urgent.
        """
        alone = len(group) == 1
        fields: dict[str, Any] = {
            "prompt": group[0].prompt if alone else [planned.prompt for planned in group],
            "max_tokens": group[0].max_tokens if alone else [planned.max_tokens for planned in group],
            "seed": group[0].seed if alone else [planned.seed for planned in group],
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "stream": True,
        }
        if any(planned.messages for planned in group) or (group[0].is_chat and self.dialect == "openai"):
            del fields["prompt"]
            fields["messages"] = group[0].chat if alone else [planned.chat for planned in group]
        elif group[0].is_chat:
            fields["chat"] = True
        fields |= {
            name: value
            for name, value in (("user", group[0].user), ("priority", group[0].priority))
            if value is not None
        }
        if self.dialect == "openai":
            fields["model"] = self.model
            fields["stream_options"] = {"include_usage": True}
            if ("chat" if "messages" in fields else "completions") in self.token_ids_of:
                fields["return_token_ids"] = True
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()

    def request(self, body: bytes, *, is_chat: bool = False) -> bytes:
        """Head and body, ready for the socket."""
        path = self.path
        if is_chat and self.dialect == "openai":
            path = f"{api_path(path)}/chat/completions"
        key = f"Authorization: {self.authorization}\r\n" if self.authorization else ""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.origin.host_header}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Accept: text/event-stream\r\nAccept-Encoding: identity\r\nUser-Agent: batching-lab\r\n{key}\r\n"
        )
        return head.encode("latin-1") + body


def parse_origin(url: str) -> tuple[Origin, str]:
    """Split a URL into where to connect and the path it names (without a trailing slash).

    Raises:
        ConfigError: it is not an http or https URL with a host.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"URL={url} cannot be read: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"URL must look like http://host:port or https://host, not {url!r}")
    is_tls = parts.scheme == "https"
    return Origin(parts.hostname, port or (443 if is_tls else 80), is_tls), parts.path.rstrip("/")


def completions_paths(path: str) -> tuple[str, ...]:
    """Where an OpenAI-compatible server may have its completions, by its base URL's path, likeliest first."""
    if path.endswith("/completions"):
        return (path,)
    if _API_VERSION.search(path):
        return (f"{path}/completions",)
    return f"{path}/v1/completions", f"{path}/v3/completions"  # the second of OpenVINO Model Server


def api_path(path: str) -> str:
    """As: /v1, from its own path or that of its completions."""
    return path.removesuffix("/completions").removesuffix("/chat") if path.endswith("/completions") else path


def root_path(path: str) -> str:
    """Beside `/v1`, where a server has its other pages."""
    return _API_VERSION.sub("", api_path(path))
