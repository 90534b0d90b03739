"""The files of one commit of a hub repository, brought into a folder and compared with what the hub says.

A file that was cut off goes on where it stopped, also in a later run. This is why `snapshot_download` of
huggingface_hub is not used: it goes on within one run only, and leaves the bytes of a killed one to lie
(`_download_to_tmp_and_move` in its file_download.py); nor does it compare digests.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from adapters.base import ConfigError
from adapters.models.digests import file_sha256
from adapters.models.hub import NOT_NEEDED, SMALL_FILES, hub_errors

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


def list_commit(repo_id: str, only: str | None = None) -> ModelInfo:
    """A repository's newest commit; its `siblings` are what a text model needs, or just the file `only`.

    Raises:
        ConfigError: no network, no such model or file, no permission, or no weights in it.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo_id):
        info = HfApi().model_info(repo_id, files_metadata=True)
    listed = info.siblings or []
    info.siblings = [f for f in listed if f.rfilename == only] if only else _needed(listed)
    if not info.siblings:
        what = f"file {only}" if only else "weights in safetensors or bin format"
        raise ConfigError(f"{repo_id} has no {what}")
    return info


def download(commit: ModelInfo, folder: Path) -> None:
    """Bring every file that is not there yet, and check all.

    Raises:
        ConfigError: the connection failed, or a file is not what the hub says; running again goes on.
    """
    for file in commit.siblings or []:
        path = folder / _safe(file.rfilename, commit.id)
        if not (path.is_file() and _is_intact(path, file)):
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(commit, file, path)


def num_bytes(commit: ModelInfo) -> int:
    return sum(file.size or 0 for file in commit.siblings or [])


def _needed(files: list[RepoSibling]) -> list[RepoSibling]:
    """The files that `fetch_from_hub` would ask for; weights as .bin only where there are no safetensors."""
    from huggingface_hub.utils import filter_repo_objects

    for weights in ("*.safetensors", "*.bin"):
        patterns = {"allow_patterns": [*SMALL_FILES, weights], "ignore_patterns": NOT_NEEDED}
        needed = list(filter_repo_objects(files, key=lambda file: file.rfilename, **patterns))
        if any(fnmatch(file.rfilename, weights) for file in needed):
            return needed
    return []


def _safe(name: str, repo_id: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"{repo_id} names a file outside its folder: {name}")
    return path


def _fetch(commit: ModelInfo, file: RepoSibling, path: Path) -> None:
    """Download to a `.part` file, from where it ends, and rename it once it is what it should be."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = path.with_name(f"{path.name}.part")
    url = hf_hub_url(commit.id, file.rfilename, revision=commit.sha or "main")
    with hub_errors(commit.id), part.open("ab") as stream:
        if stream.tell() > (file.size or 0):
            stream.truncate(0)
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=file.size,
            displayed_filename=file.rfilename,
        )
    if not _is_intact(part, file):
        part.unlink()
        raise ConfigError(
            f"{file.rfilename} of {commit.id} arrived damaged (its size or digest is not what the hub says); "
            "it was removed, run again to fetch it anew"
        )
    part.rename(path)


def _is_intact(path: Path, file: RepoSibling) -> bool:
    """Whether a file is what the hub says: large files have a SHA-256 there, others git's blob id."""
    from huggingface_hub.utils.sha import git_hash

    if path.stat().st_size != file.size:
        return False
    if file.lfs is not None:
        return file_sha256(path) == str(file.lfs.sha256)
    return file.blob_id is None or git_hash(path.read_bytes()) == file.blob_id
