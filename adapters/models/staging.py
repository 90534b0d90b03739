"""Puts a model into a folder of its own, ready before a server starts from it.

An interrupted run is continued by the next one of the same model. A server that is pointed at the folder
waits while a run is at work on it.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters.base import ConfigError
from adapters.models.artifact import (
    Manifest,
    damaged_files,
    is_being_made,
    make_once,
    missing_files,
    read_manifest,
)
from adapters.models.digests import STAGED_MANIFEST, list_files, listing_digest

logger = logging.getLogger(__name__)

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
    manifest = target / STAGED_MANIFEST

    def make(unfinished: Path) -> Manifest:
        _forget_other(model, unfinished)
        fill(unfinished)
        (unfinished / _SOURCE).unlink()
        files = list_files(unfinished)
        return {"model": model, "digest": listing_digest(files), "files": files}

    try:
        was_made = make_once(target, manifest, make, lambda: _is_there(model, target), resume=True)
    except OSError as error:
        raise ConfigError(f"{model} cannot be staged in {target}: {error}") from error
    content = read_manifest(manifest)
    num_bytes = sum(entry["bytes"] for entry in content["files"].values())
    return Staged(target, content["digest"], num_bytes, was_there=not was_made)


def wait_until_staged(path: Path, limit_s: float | None) -> None:
    """Return once `path`, or the folder that it is in, is there.

    Without a limit it waits only while another process stages the folder, up to `DEFAULT_WAIT_S`. Otherwise
    it returns at once, and the caller reports that the path is missing.

    Raises:
        ConfigError: it did not appear in time.
    """
    if path.exists():
        return
    if not limit_s and not is_being_made(path) and not is_being_made(path.parent):
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


_SOURCE = ".lab_source"
"""Says in an unfinished folder which model its files are of."""


def _is_there(model: str, target: Path) -> bool:
    """Raises: ConfigError where `target` holds anything but the whole `model`."""
    if not target.exists():
        return False
    manifest = read_manifest(target / STAGED_MANIFEST)
    if not manifest:
        raise ConfigError(f"{target} exists and was not made by `lab model stage`; name another folder")
    if manifest.get("model") != model:
        raise ConfigError(f"{target} holds {manifest.get('model')}; name another folder, or remove it first")
    for path in missing_files(target / STAGED_MANIFEST) or damaged_files(target / STAGED_MANIFEST):
        raise ConfigError(f"{path} is missing, damaged or cut off; remove {target} and stage it again")
    return True


def _forget_other(model: str, unfinished: Path) -> None:
    """Files of an interrupted run are kept if they are of the same model."""
    source = unfinished / _SOURCE
    if not source.is_file() or source.read_text("utf-8") != model:
        shutil.rmtree(unfinished)
        unfinished.mkdir()
    source.write_text(model, "utf-8")
