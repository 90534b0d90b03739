"""Where results go: a folder that is there before anything is measured, and names that sort by time."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from adapters.base import ConfigError


def utc_stamp(now: datetime | None = None) -> str:
    """The time as it stands in file names, to the second."""
    return (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")


def make_folder(folder: Path) -> None:
    """Make it and all above it, unless it is there.

    Raises:
        ConfigError: it cannot be made, or not be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write into {folder}: no permission")
