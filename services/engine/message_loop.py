"""How an engine's thread lives: it takes messages between steps, and waits for them where there is nothing to
compute.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Protocol

from services.engine.messages import Cancel, Drain, Stop, Submit

Message = Submit | Cancel | Drain | Stop

_SEQUENCES_A_TURN = 512
"""So many are taken in or cancelled between two steps. The rest waits: steps must go on."""


class Inbox(Protocol):
    """Where the messages come from."""

    def get(self, timeout_s: float | None) -> Message | None:
        """The next message, or None if none comes within `timeout_s` (0: do not wait; None: no limit)."""
        ...


class QueueInbox:
    """The inbox of an engine that runs in a thread beside its sender; `put` may be called from any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def put(self, message: Message) -> None:
        self._queue.put(message)

    def get(self, timeout_s: float | None) -> Message | None:
        if timeout_s == 0 and self._queue.empty():
            return None
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None


class EngineLoop(Protocol):
    """What serves an inbox, whoever decides what its steps carry."""

    def run(self, inbox: Inbox) -> None:
        """Serve until `Stop`; sequences that are then unfinished get no further update."""
        ...

    def busy_s(self) -> float:
        """How long the present step, or acting on messages, takes by now, else 0. Any thread may call it."""
        ...


def run_loop(
    inbox: Inbox,
    handle: Callable[[list[Submit | Cancel | Drain]], None],
    step: Callable[[], float | None],
) -> None:
    """Give `handle` the messages that are there, then `step`, until `Stop` comes.

    `step` returns for how long, in s, it has nothing to do unless a message comes: 0 asks for the next turn
    at once, None for none before a message.
    """
    idle_s: float | None = 0.0
    while _take_messages(inbox, handle, idle_s):
        idle_s = step()


def _take_messages(
    inbox: Inbox, handle: Callable[[list[Submit | Cancel | Drain]], None], idle_s: float | None
) -> bool:
    """Wait up to `idle_s` for a message, act on those that are there; False after `Stop`."""
    messages: list[Submit | Cancel | Drain] = []
    message = inbox.get(idle_s)
    room = _SEQUENCES_A_TURN
    while message is not None and not isinstance(message, Stop):
        messages.append(message)
        room -= message.num_sequences
        message = inbox.get(0) if room > 0 else None
    if messages:
        handle(messages)
    return message is None
