"""Where results go: a folder that is there before anything is measured, names that sort by time, whole files.

A file that a later command reads is written by `whole_file`, so that no kill and no full disk leaves half
of one under its name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from adapters.base import ConfigError, LabError


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
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ConfigError(f"cannot write into {folder}: {getattr(error, 'strerror', error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write into {folder}: no permission")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it gets its name when the block ends, whole and on the disk. Its folder is made.

    What had the name stays until then, and stays for good when the block fails.

    Raises:
        LabError: the disk does not take it.
    """
    make_folder(path.parent)
    # Two processes may write one name at a time; the last one wins.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise LabError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    with contextlib.suppress(OSError):  # a rename is on the disk with its folder, where folders can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def free_path(folder: Path, stem: str, suffix: str = ".parquet") -> Path:
    """The file of this stem and suffix, or with a number behind the stem where that is taken."""
    path, number = folder / f"{stem}{suffix}", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path
