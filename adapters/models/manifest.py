"""What a model folder holds, told by digests.

What enters is a folder; what leaves are SHA-256 digests and, for seeded presets, the manifest that is
written when they are made and tells later whether they are whole and of today's recipe.
Knows neither names nor places of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.models.presets import CORPUS_PATH, PRESETS, RECIPE

MANIFEST = "lab_model.json"
_NOT_OF_THE_MODEL = {MANIFEST, "lab_staged.json"}
_SAMPLED_ABOVE_BYTES = 256 << 20
_SAMPLE_BYTES = 1 << 20


def write_manifest(preset_name: str, folder: Path) -> str:
    """Record the files of a new preset; return the digest of them all.

    It is the digest of what `sha256sum *` prints for the folder, the manifest left out.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }
    digest = listing_digest(files)
    manifest = {
        "name": preset_name,
        "digest": digest,
        "num_parameters": PRESETS[preset_name].num_parameters,
        "recipe": RECIPE,
        "corpus_sha256": file_sha256(CORPUS_PATH),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return digest


def listing_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The digest of what `sha256sum` prints for these files, which are given with the digest of each."""
    listing = "".join(f"{entry['sha256']}  {name}\n" for name, entry in files.items())
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a preset; empty where there is none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_current(folder: Path) -> bool:
    """Whether a preset is whole and made by today's recipe from today's corpus; reads no weights."""
    manifest = read_manifest(folder)
    if manifest.get("recipe") != RECIPE:
        return False
    if CORPUS_PATH.is_file() and manifest.get("corpus_sha256") != file_sha256(CORPUS_PATH):
        return False
    sizes = {folder / name: entry["bytes"] for name, entry in manifest.get("files", {}).items()}
    return bool(sizes) and all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def changed_files(folder: Path) -> list[str]:
    """The files of a preset that are not what its manifest says; reads all of them."""
    recorded = read_manifest(folder).get("files", {})
    return [
        name
        for name, entry in recorded.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != entry["sha256"]
    ]


def folder_digest(folder: Path) -> str:
    """A digest of all files of a folder. Very large ones are only sampled, and the prefix says so."""
    digest = hashlib.sha256()
    is_sampled = False
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name not in _NOT_OF_THE_MODEL):
        is_large = path.stat().st_size > _SAMPLED_ABOVE_BYTES
        is_sampled |= is_large
        content = _sampled_sha256(path) if is_large else file_sha256(path)
        digest.update(f"{content}  {path.name}\n".encode())
    return f"{'sampled-' if is_sampled else ''}sha256:{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """A digest of one file; a very large one is only sampled, and the prefix says so."""
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
