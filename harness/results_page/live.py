"""The steps of one running service for the page. Its address is given at the start, never by the browser, and
is on this machine: the page is no way to other hosts."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from adapters.base import ConfigError, LabError
from harness.client.control import Control
from harness.client.server import LOOPBACK

_SHOWN = ("start_s", "duration_s", "num_rows", "num_dead_rows", "queue_depth")
NUM_FIRST = 1000
"""Steps that a page gets which has just been opened."""


class LiveSteps:
    def __init__(self, url: str) -> None:
        """
        Raises:
            ConfigError: it is no http URL of this machine.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname not in LOOPBACK or parts.username is not None:
            raise ConfigError(f"--watch takes an address of this machine, http://127.0.0.1:8000, not {url!r}")
        self._url = url

    def since(self, after: int | None) -> dict[str, Any]:
        """Steps from number `after` on (None: the last ones), `next`, and the slots that they share.

        `problem` stands alone while no service of ours answers.
        """
        try:
            with Control(self._url) as control:
                card = control.model_card()
                following = control.next_step()
                if card is None or following is None:
                    return {"problem": "no service of the lab"}
                # A service that was started anew counts from zero again.
                is_known = after is not None and after <= following
                first = max(after if after is not None and is_known else 0, following - NUM_FIRST)
                lines, _ = control.steps_since(first)
        except LabError as error:
            return {"problem": str(error)}
        steps = [{name: getattr(line, name) for name in _SHOWN} for line in lines]
        return {
            "is_new": not is_known,
            "next": first + len(steps),
            "slots": card.max_batch_size,
            "variant": card.variant,
            "model": card.model,
            "steps": steps,
        }
