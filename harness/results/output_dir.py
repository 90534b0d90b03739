"""A folder to write into, made before anything starts whose results would have no place."""

from __future__ import annotations

import os
from pathlib import Path

from adapters.base import ConfigError


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
