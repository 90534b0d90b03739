"""Files and folders that take long to make: one process makes them, and they appear whole or not at all.

The work is done under a hidden name beside the final one, and a rename is its last act. Whoever finds the
final name therefore needs no lock. A JSON manifest says what was made: inside a folder, beside a file.

A disk or a copy can damage a file later and leave its size. So each file is read and compared with its
manifest once, and again only when its inode, size or times are others. The manifest carries a CRC-32 of its
own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adapters.models.digests import file_sha256

logger = logging.getLogger(__name__)

Manifest = dict[str, Any]
Make = Callable[[Path], Manifest]
"""Fills the folder (or writes the file) at the path that it is given; returns what the manifest is to say."""


def make_once(
    path: Path, manifest: Path, make: Make, is_current: Callable[[], bool], *, resume: bool = False
) -> bool:
    """Make `path`, unless `is_current()` finds that it is there; return whether this call made it.

    `manifest` lies inside `path` where that is a folder, else beside it. `resume` keeps what an interrupted
    run left, and `make` goes on from there; without, `make` starts from nothing.

    Raises:
        OSError: it cannot be written. What `make` and `is_current` raise passes through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_path(path)
    is_folder = manifest.parent == path
    with _only_one(path):
        if is_current():
            return False
        try:
            if not resume:
                _remove(unfinished)
            if is_folder:
                unfinished.mkdir(exist_ok=True)
            content = make(unfinished)
            if is_folder:
                _write_manifest(unfinished / manifest.name, content)
                _sync(unfinished)
                _replace(unfinished, path)
            else:
                _sync(unfinished)
                # A manifest must never describe the file of an earlier run, so it goes first and comes last.
                manifest.unlink(missing_ok=True)
                unfinished.replace(path)
                _write_manifest(manifest, content)
        finally:
            if not resume:
                _remove(unfinished)
    return True


def is_being_made(path: Path) -> bool:
    """Whether a process is at work on `path` now; what a killed one left is no sign of that."""
    if not path.name or not unfinished_path(path).exists():
        return False
    try:
        with FileLock(lock_path(path), timeout=0):
            return False
    except Timeout:
        return True


def unfinished_path(path: Path) -> Path:
    return path.with_name(f".making-{path.name}")


def lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def read_manifest(manifest: Path) -> Manifest:
    """What a manifest says; empty where there is none that is whole. Those of earlier versions lack a CRC."""
    try:
        content = json.loads(manifest.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.pop("crc32", None) not in (None, _checksum(content)):
        return {}
    files = content.get("files", {})
    listed = files.values() if isinstance(files, dict) else [None]
    is_whole = all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in listed)
    return content if is_whole else {}


def missing_files(manifest: Path) -> list[Path]:
    """The files of a folder that are not there or have another size than listed; reads no contents."""
    listed = read_manifest(manifest).get("files", {})
    sizes = {manifest.parent / name: entry["bytes"] for name, entry in listed.items()}
    return [path for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size]


def changed_files(manifest: Path) -> list[str]:
    """The files of a folder that are not what its manifest says; reads all of them."""
    return [
        name
        for name, entry in read_manifest(manifest).get("files", {}).items()
        if not (manifest.parent / name).is_file() or file_sha256(manifest.parent / name) != entry["sha256"]
    ]


def damaged_files(manifest: Path) -> list[Path]:
    """The files of a folder that are not what its manifest says; reads those that nobody has compared yet."""
    listed = read_manifest(manifest).get("files", {})
    return damaged(
        {manifest.parent / name: entry["sha256"] for name, entry in listed.items()}, manifest.parent
    )


def damaged(sha256_of: Mapping[Path, str], beside: Path) -> list[Path]:
    """Those of the files that have another SHA-256; what was compared is noted beside `beside`."""
    record = beside.with_name(f".{beside.name}.compared.json")
    compared = read_manifest(record)
    now: Manifest = {}
    wrong = []
    for path, sha256 in sha256_of.items():
        name = os.path.relpath(path, beside)
        now[name] = [sha256, *_identity(path)]
        if compared.get(name) != now[name] and file_sha256(path) != sha256:
            wrong.append(path)
    if not wrong and compared != now:
        _note_compared(record, now)
    return wrong


def _identity(path: Path) -> tuple[int, ...]:
    """Another one after every write. Both times, since the time of the last change can be set back."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _note_compared(record: Path, now: Manifest) -> None:
    unfinished = record.with_name(f"{record.name}.{os.getpid()}")
    try:
        _write_manifest(unfinished, now)
        unfinished.replace(record)
    except OSError:  # in a folder that cannot be written, every start compares
        logger.debug("%s cannot be written", record)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    lock = FileLock(lock_path(path))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.info("another process is making %s: waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_manifest(manifest: Path, content: Manifest) -> None:
    whole = {**content, "crc32": _checksum(content)}
    manifest.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


def _checksum(content: Manifest) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def _sync(path: Path) -> None:
    """Without this a power cut can leave the new name on a file whose bytes never reached the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


def _replace(unfinished: Path, path: Path) -> None:
    """A folder cannot be renamed over another, so the old one moves into the new one and goes last."""
    if path.exists():
        path.rename(unfinished / ".replaced")
    unfinished.rename(path)
    shutil.rmtree(path / ".replaced", ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
