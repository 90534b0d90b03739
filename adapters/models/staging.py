"""Puts a model into a folder of its own, whole, checked and with a manifest, for servers that start from it.

What enters are a name and a target folder; what leaves is a `Staged`. Files gather in a hidden folder beside
the target, each is compared with its size and digest, and one rename makes them count. What an interrupted
run left is used by the next. A lock keeps two runs apart. Knows no backend's way of reading a model.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adapters.base import ConfigError
from adapters.models.manifest import MANIFEST, file_sha256, listing_digest

logger = logging.getLogger(__name__)

STAGED_MANIFEST = "lab_staged.json"
DEFAULT_WAIT_S = 600.0
_POLL_S = 0.25
_REMIND_S = 15.0

Fill = Callable[[Path], None]
"""Brings all files into a folder, which may hold some already; raises ConfigError where it cannot."""


@dataclass(frozen=True, slots=True)
class Staged:
    """`was_there`: an earlier run had done it all."""

    folder: Path
    digest: str
    num_bytes: int
    was_there: bool


def stage(model: str, target: Path, fill: Fill) -> Staged:
    """Fill `target` by `fill`, unless it holds `model` already.

    Raises:
        ConfigError: the folder holds something else, cannot be written, or `fill` failed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target):
            if target.exists():
                return _found(model, target)
            unfinished = unfinished_folder(target)
            _forget_other(model, unfinished)
            fill(unfinished)
            (unfinished / _SOURCE).unlink(missing_ok=True)
            manifest = _write_manifest(model, unfinished)
            unfinished.rename(target)
            return _staged(target, manifest, was_there=False)
    except OSError as error:
        raise ConfigError(f"{model} cannot be staged in {target}: {error}") from error


def unfinished_folder(target: Path) -> Path:
    return target.with_name(f".staging-{target.name}")


def read_staged(folder: Path) -> dict[str, Any]:
    """The manifest of a staged folder; empty where there is none that can be read."""
    try:
        content = json.loads((folder / STAGED_MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def changed_staged_files(folder: Path) -> list[str]:
    """The files of a staged folder that are not what its manifest says; reads all of them."""
    return [
        name
        for name, entry in read_staged(folder).get("files", {}).items()
        if not (folder / name).is_file() or file_sha256(folder / name) != entry["sha256"]
    ]


def wait_until_staged(path: Path, limit_s: float | None) -> None:
    """Return once `path`, or the folder that it is in, is there.

    Without a limit it waits only while a run is at work there, up to `DEFAULT_WAIT_S`; where nobody is, it
    returns at once, and whoever looks for the path says that it is missing.

    Raises:
        ConfigError: it did not appear in time.
    """
    if path.exists():
        return
    if not limit_s and not is_being_staged(path):
        return
    limit_s = limit_s or DEFAULT_WAIT_S
    started_s = reminded_s = time.monotonic()
    logger.info("%s is not there yet: waiting for it to be staged, up to %g s", path, limit_s)
    while not path.exists():
        now_s = time.monotonic()
        if now_s - started_s >= limit_s:
            raise ConfigError(
                f"{path} was not staged within {limit_s:g} s; `lab model stage MODEL --to {path}` does it, "
                "and MODEL_WAIT_S sets how long a server waits"
            )
        if now_s - reminded_s >= _REMIND_S:
            reminded_s = now_s
            logger.info("still waiting for %s, %.0f of %g s", path, now_s - started_s, limit_s)
        time.sleep(_POLL_S)
    logger.info("%s is there after %.1f s", path, time.monotonic() - started_s)


def is_being_staged(path: Path) -> bool:
    """Whether a run is at work on this folder, or on the one that this file is to be in."""
    for target in (path, path.parent):
        if target.name and unfinished_folder(target).is_dir():
            try:
                with FileLock(_lock_path(target), timeout=0):
                    pass
            except Timeout:
                return True
    return False


_SOURCE = ".lab_source"
"""Says in an unfinished folder which model its files are of."""


def _lock_path(target: Path) -> Path:
    return target.with_name(f".staging-{target.name}.lock")


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    lock = FileLock(_lock_path(target))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.info("another process is staging %s: waiting for it", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _found(model: str, target: Path) -> Staged:
    manifest = read_staged(target)
    if not manifest:
        raise ConfigError(f"{target} exists and was not made by `lab model stage`; name another folder")
    if manifest.get("model") != model:
        raise ConfigError(f"{target} holds {manifest.get('model')}; name another folder, or remove it first")
    for name, entry in manifest["files"].items():
        path = target / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise ConfigError(f"{path} is missing or cut off; remove {target} and stage it again")
    return _staged(target, manifest, was_there=True)


def _forget_other(model: str, unfinished: Path) -> None:
    """Files of an interrupted run are kept if they are of the same model."""
    source = unfinished / _SOURCE
    if unfinished.exists() and (not source.is_file() or source.read_text("utf-8") != model):
        shutil.rmtree(unfinished)
    unfinished.mkdir(exist_ok=True)
    source.write_text(model, "utf-8")


def _write_manifest(model: str, folder: Path) -> dict[str, Any]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != STAGED_MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    of_the_model = {name: entry for name, entry in files.items() if name != MANIFEST}
    manifest = {"model": model, "digest": listing_digest(of_the_model), "files": files}
    (folder / STAGED_MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def _staged(folder: Path, manifest: dict[str, Any], *, was_there: bool) -> Staged:
    num_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    return Staged(folder, manifest["digest"], num_bytes, was_there)
