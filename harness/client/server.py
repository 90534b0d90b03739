"""The server under test: a service of ours (it has `/model`) or any OpenAI-compatible one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from urllib.parse import urlsplit, urlunsplit

from adapters.base import LabError
from harness.client.control import Control
from harness.client.target import Target, completions_path, parse_origin
from harness.settings import HarnessSettings, split_login
from services.contract.status import ModelCard

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Server:
    """`card` is None for a foreign server, `pid` for one that the harness did not start."""

    url: str
    target: Target
    card: ModelCard | None
    pid: int | None

    @property
    def client_chunk(self) -> int:
        return self.card.client_chunk if self.card else 1

    @property
    def model(self) -> str:
        return self.card.model if self.card else self.target.model or "unknown"

    @property
    def backend(self) -> str:
        return self.card.backend if self.card else "external"

    @property
    def keeps_prompts(self) -> bool:
        """Whether a prompt may be cheaper the second time: a prefix cache of ours, or of a foreign engine."""
        card = self.card
        return card is None or bool(card.strategy.get("prefix_cache") or card.details.get("prefix_caching"))

    @property
    def is_local(self) -> bool:
        return self.pid is not None or self.target.origin.host in LOOPBACK


def find_server(url: str, settings: HarnessSettings, pid: int | None = None) -> Server:
    """Ask what answers at `url`, which has to be process `pid` where the harness started one.

    Raises:
        LabError: nothing does, another process does, or it cannot be told how to ask it.
    """
    url, login = split_login(url)
    origin, prefix = parse_origin(url)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    target = Target(
        origin, f"{prefix}/generate", "lab", None, settings.temperature, key, login, settings.ignore_eos
    )
    with Control(url, target.authorization) as control:
        card = control.model_card()
        if pid is not None and (card is None or card.pid != pid):
            other = "does not describe itself at /model" if card is None else f"is process {card.pid}"
            raise LabError(f"the server at {url} {other}, so it is not the service that was started ({pid})")
        if card is not None:
            return Server(url, replace(target, model=card.model), card, pid)
        path = completions_path(prefix)
        scheme, netloc, *_ = urlsplit(url)
        models_url = urlunsplit((scheme, netloc, path.removesuffix("/completions") + "/models", "", ""))
        model = settings.model or control.first_model_name(models_url)
    return Server(url, replace(target, path=path, dialect="openai", model=model), None, pid)
