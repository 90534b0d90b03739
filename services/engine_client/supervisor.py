"""Keeps an engine running: starts the first, and after a loss the next one, each time after a longer pause.

The first start may fail for good (a wrong setting, say); later ones are tried until `close`. The supervisor
knows no requests: `on_lost` ends those in flight.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from adapters.base import BackendInfo, LabError
from services.engine.message_loop import Message
from services.engine.spec import EngineSpec
from services.engine_client.client import EngineClient, MakeClient, OnLost, OnReport

WorkerState = Literal["running", "starting", "restarting", "failed"]

FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 30.0
STABLE_AFTER_S = 30.0
"""A loss after so long is the first of a new row: pauses are short again."""
_MAX_DOUBLINGS = 20
FAILED_AFTER = 4
"""Losses in a row after which the state is called failed; tries go on."""

logger = logging.getLogger(__name__)


class Supervisor:
    def __init__(
        self,
        spec: EngineSpec,
        make_client: MakeClient,
        on_report: OnReport,
        on_lost: OnLost,
        on_restart: Callable[[], None],
    ) -> None:
        self.state: WorkerState = "starting"
        self._spec = spec
        self._make_client = make_client
        self._on_report = on_report
        self._on_lost = on_lost
        self._on_restart = on_restart
        self._client: EngineClient | None = None
        self._num_losses = 0
        self._ready_s = 0.0
        self._restarting: asyncio.Task[None] | None = None
        self._is_closed = False

    async def start(self) -> BackendInfo:
        """Start the first engine.

        Raises:
            LabError: it cannot be loaded; `state` is "failed" then.
        """
        try:
            return await self._start_client()
        except LabError:
            self.state = "failed"
            raise

    @property
    def engine_pid(self) -> int | None:
        """None where the engine has no process of its own, or none now."""
        return getattr(self._client, "pid", None)

    def send(self, message: Message) -> None:
        if self._client is not None:
            self._client.send(message)

    async def close(self) -> None:
        """End the engine and start no other."""
        self._is_closed = True
        if self._restarting is not None:
            self._restarting.cancel()
        if self._client is not None:
            await self._client.close()

    async def _start_client(self) -> BackendInfo:
        self._client = client = self._make_client(self._spec, self._on_report, self._lost)
        info = await client.start()
        self.state = "running"
        self._ready_s = time.monotonic()
        return info

    def _lost(self, reason: str) -> None:
        if self._is_closed:
            return
        logger.error("the engine is lost: %s", reason)
        if time.monotonic() - self._ready_s > STABLE_AFTER_S:
            self._num_losses = 0
        self._count_loss()
        self._on_lost(reason)
        self._restarting = asyncio.get_running_loop().create_task(self._restart())

    def _count_loss(self) -> None:
        self._num_losses += 1
        self.state = "failed" if self._num_losses >= FAILED_AFTER else "restarting"

    async def _restart(self) -> None:
        while True:
            try:
                if self._client is not None:
                    await self._client.close()  # its memory is needed for the next one
                await asyncio.sleep(_pause_s(self._num_losses))
                await self._start_client()
            except LabError as error:
                logger.error("the engine could not be restarted: %s", error)
                self._count_loss()
            except Exception:  # the system has no process or descriptor left, say; it may have one later
                logger.exception("the engine could not be restarted")
                self._count_loss()
            else:
                self._on_restart()
                logger.info("the engine runs again")
                return


def _pause_s(num_losses: int) -> float:
    return min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(num_losses - 1, _MAX_DOUBLINGS))
