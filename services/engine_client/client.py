"""What the API knows of an engine, wherever it runs: `EngineProcess` (the usual way) and `EngineThread`.

A client serves one engine from its start to its end. Once its engine is lost it says so and stays dead;
`services.engine_client.supervisor` makes the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from adapters.base import BackendInfo
from services.engine.message_loop import Message
from services.engine.messages import StepReport
from services.engine.spec import EngineSpec

STOP_WITHIN_S = 5.0

OnReport = Callable[[StepReport], None]
OnLost = Callable[[str], None]


class EngineClient(Protocol):
    """All calls come from the event loop's thread, and so do the calls of its `OnReport` and `OnLost`."""

    async def start(self) -> BackendInfo:
        """Load the model.

        Raises:
            LabError: it cannot be loaded; the client is dead then.
        """
        ...

    def send(self, message: Message) -> None:
        """Never waits, whatever the engine does; does nothing once the engine is lost."""
        ...

    async def close(self) -> None:
        """End the engine after its current step, by force if that takes too long."""
        ...


MakeClient = Callable[[EngineSpec, OnReport, OnLost], EngineClient]
