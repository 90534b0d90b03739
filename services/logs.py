"""Log lines for people (console) or for collectors (one JSON object a line), to stderr.

A line may carry fields of its own, given to the logger as `extra={"fields": {...}}`: in JSON they are keys,
on a console they follow the sentence as name=value. What requests hold stays on its line: control characters
are escaped in both.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from adapters.text.unicode_text import printable

LogFormat = Literal["console", "json"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class _Console(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return printable(" ".join([line, *(f"{name}={value}" for name, value in _fields(record).items())]))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up_logs(level: str, log_format: LogFormat, *, process: str = "api") -> None:
    """Replace whatever the root logger has."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = (
        _Json(process) if log_format == "json" else _Console("" if process == "api" else f"{process}: ")
    )
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields
