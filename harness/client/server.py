"""The server under test: a service of ours (it has `/model`) or any OpenAI-compatible one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from adapters.base import LabError
from adapters.text.unicode_text import printable
from harness.client.control import Control
from harness.client.server_kind import FoundKind, find_kind, first_listed
from harness.client.target import Target, api_path, completions_paths, parse_origin, root_path
from harness.settings import HarnessSettings, split_login
from services.contract.status import ModelCard

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LISTING_S, _PAGE_S, _KIND_S = 10.0, 0.7, 2.0
"""For a listing of models that the run needs, for one page beside it, for all that only tells the kind."""


@dataclass(frozen=True, slots=True)
class Server:
    """`card` is None for a foreign server, `pid` for one that the harness did not start.

    `kind` is what a foreign server was recognised as.
    """

    url: str
    target: Target
    card: ModelCard | None
    pid: int | None
    kind: FoundKind | None = None

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
        until_s = perf_counter() + (_KIND_S if settings.model else _LISTING_S)
        path, listing = _find_listing(control, prefix, until_s)
        model = settings.model or _first_model(listing)
        if model is None:
            where = f"{origin.host_header}{api_path(path)}/models"
            raise LabError(f"{where} does not say which model is served; set MODEL")
        until_s = min(until_s, perf_counter() + _KIND_S)
        kind = find_kind(
            listing,
            lambda page: control.page(root_path(path) + page, min(until_s, perf_counter() + _PAGE_S)),
        )
    ids = kind.token_ids_of if kind else ()
    foreign = replace(target, path=path, dialect="openai", model=model, token_ids_of=ids)
    return Server(url, foreign, None, pid, kind)


def _find_listing(control: Control, prefix: str, until_s: float) -> tuple[str, Any]:
    """Where the completions are, and the models that stand beside them; None where nothing lists any."""
    paths = completions_paths(prefix)
    for path in paths:
        listing = control.page(f"{api_path(path)}/models", until_s)
        if _first_model(listing) is not None:
            return path, listing
    return paths[0], None


def _first_model(listing: Any) -> str | None:
    name = first_listed(listing, "id")
    return None if name is None else printable(name)
