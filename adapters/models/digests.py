"""SHA-256 digests of model files and folders.

A digest over a whole folder is that of what `sha256sum *` prints there, so a user can check it by hand. Files
above 256 MiB of a folder that the lab did not make are sampled, since a server must not read 16 GB before it
starts; such a digest says so in its prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRESET_MANIFEST = "lab_model.json"
STAGED_MANIFEST = "lab_staged.json"
_NOT_OF_THE_MODEL = {PRESET_MANIFEST, STAGED_MANIFEST}
_SAMPLED_ABOVE_BYTES = 256 << 20
_SAMPLE_BYTES = 1 << 20


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, by its path inside `folder`; reads all of them."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def listing_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The digest of the model that `list_files` listed; manifests are no part of it."""
    of_the_model = {name: entry for name, entry in files.items() if name not in _NOT_OF_THE_MODEL}
    listing = "".join(f"{entry['sha256']}  {name}\n" for name, entry in of_the_model.items())
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def folder_digest(folder: Path) -> str:
    """The same digest for the files of a folder that has no manifest; large ones are sampled."""
    digest = hashlib.sha256()
    is_sampled = False
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name not in _NOT_OF_THE_MODEL):
        is_large = path.stat().st_size > _SAMPLED_ABOVE_BYTES
        is_sampled |= is_large
        content = _sampled_sha256(path) if is_large else file_sha256(path)
        digest.update(f"{content}  {path.name}\n".encode())
    return f"{'sampled-' if is_sampled else ''}sha256:{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """A digest of one file; a large one is sampled."""
    if path.stat().st_size > _SAMPLED_ABOVE_BYTES:
        return f"sampled-sha256:{_sampled_sha256(path)}"
    return f"sha256:{file_sha256(path)}"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_sha256(path: Path) -> str:
    """The size, one MiB of each 64th part, and the last MiB: enough to tell two trainings apart."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        for offset in [part * size // 64 for part in range(64)] + [size - _SAMPLE_BYTES]:
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
