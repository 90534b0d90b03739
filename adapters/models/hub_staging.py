"""The files of one commit of a hub repository, brought into a folder and compared with what the hub says.

A repository and a folder enter; files of the right size and digest leave. A file that was cut off goes on
where it stopped, also in a later run. Progress is shown by huggingface_hub's own bars.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from adapters.base import ConfigError
from adapters.models.hub import NOT_NEEDED, SMALL_FILES, hub_errors
from adapters.models.manifest import file_sha256

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit. `sha256` is known for large files, git's `blob_id` for all."""

    name: str
    num_bytes: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True, slots=True)
class HubCommit:
    repo_id: str
    commit: str
    files: tuple[HubFile, ...]


def list_commit(repo_id: str, only: str | None = None) -> HubCommit:
    """What a text model needs of a repository's newest commit; with `only`, that one file.

    Raises:
        ConfigError: no network, no such model or file, no permission, or no weights in it.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo_id):
        info = HfApi().model_info(repo_id, files_metadata=True)
    listed = [
        HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or []
    ]
    chosen = [f for f in listed if f.name == only] if only else _needed(listed)
    if not chosen:
        what = f"file {only}" if only else "weights in safetensors or bin format"
        raise ConfigError(f"{repo_id} has no {what}")
    return HubCommit(repo_id, info.sha or "main", tuple(chosen))


def download(commit: HubCommit, folder: Path) -> None:
    """Bring every file that is not there yet, and check all.

    Raises:
        ConfigError: the connection failed, or a file is not what the hub says; running again goes on.
    """
    for file in commit.files:
        path = folder / _safe(file.name, commit.repo_id)
        if not (path.is_file() and _is_intact(path, file)):
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(commit, file, path)


def _needed(files: Iterable[HubFile]) -> list[HubFile]:
    wanted = [f for f in files if not any(fnmatch(f.name, pattern) for pattern in NOT_NEEDED)]
    small = [f for f in wanted if any(fnmatch(f.name, pattern) for pattern in SMALL_FILES)]
    for pattern in ("*.safetensors", "*.bin"):
        weights = [f for f in wanted if fnmatch(f.name, pattern)]
        if weights:
            return small + weights
    return []


def _safe(name: str, repo_id: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"{repo_id} names a file outside its folder: {name}")
    return path


def _fetch(commit: HubCommit, file: HubFile, path: Path) -> None:
    """Download to a `.part` file, from where it ends, and rename it once it is what it should be."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = path.with_name(f"{path.name}.part")
    url = hf_hub_url(commit.repo_id, file.name, revision=commit.commit)
    with hub_errors(commit.repo_id), part.open("ab") as stream:
        if stream.tell() > file.num_bytes:
            stream.truncate(0)
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=file.num_bytes,
            displayed_filename=file.name,
        )
    if not _is_intact(part, file):
        part.unlink()
        raise ConfigError(
            f"{file.name} of {commit.repo_id} arrived damaged (its size or digest is not what the hub says); "
            "it was removed, run again to fetch it anew"
        )
    part.rename(path)


def _is_intact(path: Path, file: HubFile) -> bool:
    if path.stat().st_size != file.num_bytes:
        return False
    if file.sha256 is not None:
        return file_sha256(path) == file.sha256
    return file.blob_id is None or _git_blob_id(path) == file.blob_id


def _git_blob_id(path: Path) -> str:
    """Source: git's object format: the SHA-1 of "blob", the size, a zero byte and the content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
