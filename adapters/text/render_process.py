"""Chat templates are rendered in a process of their own, which is killed where one does not end.

A thread would not do: it cannot be ended, and one that computes `'x' * 10**9` keeps the interpreter's lock.
The process starts with the first chat, serves one at a time, and is replaced after it was killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from adapters.base import ChatTemplateError

TIMEOUT_S = 5.0
MAX_MEMORY_BYTES = 1 << 30
MAX_RENDERED_CHARS = 32 << 20
"""Far more than any model's context."""
_START_S = 60.0


class RenderProcess:
    """Its callers may be in several threads; each waits for its turn."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def render(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        messages: Sequence[Mapping[str, object]],
        options: Mapping[str, object],
    ) -> str:
        """`jinja_chat.render`. Raises: ChatTemplateError, also where it takes too much time or memory."""
        with self._lock:
            try:
                pipe = self._started()
                pipe.send((source, special_tokens, messages, options))
                if not pipe.poll(self._timeout_s):
                    raise ChatTemplateError(
                        f"the model's chat template does not end within {self._timeout_s:g} s"
                    )
                is_whole, text = pipe.recv()
            except (EOFError, OSError):
                self.close()
                raise ChatTemplateError("the model's chat template ended the process that ran it") from None
            except BaseException:
                self.close()
                raise
        if not is_whole:
            raise ChatTemplateError(text)
        return str(text)

    def close(self) -> None:
        """End the process; a later call of `render` starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _started(self) -> Connection:
        if self._pipe is not None:
            return self._pipe
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._timeout_s), name="lab-chat", daemon=True)
        with theirs:
            process.start()
        self._process = process
        if not self._pipe.poll(_START_S):  # what it says first
            raise ChatTemplateError("the process that renders chats does not start")
        self._pipe.recv()
        return self._pipe


RENDERER = RenderProcess()
"""The one of this process, for all templates."""


def _serve(pipe: Connection, timeout_s: float) -> None:
    """What the process runs, until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches whole process groups; the parent decides
    from adapters.text import jinja_chat  # noqa: F401  before a chat waits, and in this process alone

    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    pipe.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            given = pipe.recv()
            # Should the parent be killed meanwhile, nobody else would end this process.
            signal.setitimer(signal.ITIMER_REAL, timeout_s + 1.0)
            answer = _answer(*given)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            pipe.send(answer)


def _answer(
    source: str,
    special_tokens: Mapping[str, str],
    messages: Sequence[Mapping[str, object]],
    options: Mapping[str, object],
) -> tuple[bool, str]:
    """The text, or False and what is wrong."""
    from adapters.text import jinja_chat

    try:
        text = jinja_chat.render(source, special_tokens, messages, options)
    except ChatTemplateError as error:
        return False, str(error)
    if len(text) > MAX_RENDERED_CHARS:
        return False, f"the model's chat template makes {len(text)} characters of these messages"
    return True, text
