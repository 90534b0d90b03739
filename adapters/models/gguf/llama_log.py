"""llama.cpp's log as records of Python's logging, each at the level that llama.cpp gave it.

The logger `llama.cpp` shows warnings and worse, and everything where the lab logs at DEBUG: loading alone
writes some hundred lines of information. Error lines can be collected, since they are how llama.cpp says why
it refused.
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp.llama_cpp as C

logger = logging.getLogger("llama.cpp")

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
"""Source: `enum ggml_log_level` of ggml.h."""
_CONTINUED = 5
_FUNCTION = re.compile(r"^\w+: ")


class ErrorLines:
    """What llama.cpp logged as errors, one line an entry."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def summary(self) -> str:
        """The errors in one sentence, without the names of the functions that wrote them, each once."""
        short = [
            re.sub(r"^(error loading model|llama_\w+): ", "", _FUNCTION.sub("", line)) for line in self.lines
        ]
        return "; ".join(dict.fromkeys(short))


class _LineLog:
    """Joins pieces to lines: llama.cpp writes dots of progress and halves of lines."""

    def __init__(self) -> None:
        self.collecting: list[ErrorLines] = []
        self._level = logging.INFO
        self._rest = ""

    def take(self, level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level != _CONTINUED:
            self._level = _LEVELS.get(level, logging.INFO)
        *lines, self._rest = (self._rest + text.decode("utf-8", "replace")).split("\n")
        for line in lines:
            if line.strip(" ."):
                self._emit(line.strip())

    def _emit(self, line: str) -> None:
        logger.log(self._level, "%s", line)
        if self._level >= logging.ERROR:
            for errors in self.collecting:
                errors.lines.append(line)


_log = _LineLog()
_callback = C.llama_log_callback(_log.take)  # C keeps the pointer, so this name keeps the object


def route_log() -> None:
    """Send llama.cpp's log to `logger` from now on."""
    if logger.level == logging.NOTSET and logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        logger.setLevel(logging.WARNING)
    C.llama_log_set(_callback, ctypes.c_void_p(0))


@contextmanager
def errors_of() -> Iterator[ErrorLines]:
    """Collect what llama.cpp logs as errors inside the block."""
    route_log()
    errors = ErrorLines()
    _log.collecting.append(errors)
    try:
        yield errors
    finally:
        _log.collecting.remove(errors)
