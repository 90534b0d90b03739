"""`lab model stage MODEL --to FOLDER`: a model in a folder of its own, ready before a server starts from it.

MODEL is a preset, a hub id, a .gguf file of a hub repository, or a local folder or file. A second run of the
same finds that all is done, and an interrupted one is continued.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from adapters.base import BackendConfig, ConfigError
from adapters.models.digests import STAGED_MANIFEST
from adapters.models.gguf.store import gguf_parts, is_gguf_name, resolve_gguf
from adapters.models.hub import gguf_in_hub, looks_like_hub_id
from adapters.models.hub_staging import download, list_commit, num_bytes
from adapters.models.staging import Fill, Staged, stage
from adapters.models.store import is_preset, preset_folder, resolve_model, split_format
from adapters.registry import BACKENDS


def stage_model(config: BackendConfig, target: Path) -> Staged:
    """Stage `config.model`; a backend of GGUF files stages one of these, others a Hugging Face folder.

    Raises:
        ConfigError: it cannot be found, fetched or written; the message says what to do.
    """
    description = BACKENDS[config.backend]
    name, _ = split_format(config, description.formats)
    if is_preset(name) and target.absolute() == preset_folder(name, config.artifacts_dir).absolute():
        raise ConfigError(f"{target} is where {name} itself is kept; name another folder")
    label = config.model
    if description.weights == "gguf" and not is_gguf_name(name):
        label = f"{name} as GGUF {config.model.removeprefix(name).removeprefix(':') or config.dtype}"
    return stage(label, target, _fill(config, name))


def report(staged: Staged, seconds: float) -> str:
    """What `lab model stage` prints."""
    done = "was staged already" if staged.was_there else f"staged in {seconds:.1f} s"
    return f"{staged.folder}: {staged.num_bytes / 1e6:,.1f} MB, {staged.digest}, {done}"


def run(config: BackendConfig, target: Path) -> int:
    started_s = time.monotonic()
    print(report(stage_model(config, target), time.monotonic() - started_s))
    return 0


def _fill(config: BackendConfig, name: str) -> Fill:
    """How the files come into the folder."""
    description = BACKENDS[config.backend]
    in_hub = None if Path(name).expanduser().exists() else gguf_in_hub(name)
    if name.endswith(".gguf") and in_hub is not None:
        return lambda folder: _download(*in_hub, folder=folder)
    if description.weights == "gguf" or is_gguf_name(name):
        return lambda folder: _copy_files(gguf_parts(resolve_gguf(config).path), folder)
    if is_preset(name) or Path(name).expanduser().is_dir() or not looks_like_hub_id(name):
        return lambda folder: _copy_folder(resolve_model(config, description.formats).folder, folder)
    return lambda folder: _download(name, folder=folder)


def _copy_folder(source: Path, folder: Path) -> None:
    """The files of a model folder; folders inside it are no part of a model."""
    _copy_files([p for p in source.iterdir() if p.is_file() and p.name != STAGED_MANIFEST], folder)


def _copy_files(files: list[Path], folder: Path) -> None:
    _check_room(sum(path.stat().st_size for path in files), folder)
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _download(repo_id: str, only: str | None = None, *, folder: Path) -> None:
    commit = list_commit(repo_id, only)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _check_room(num_bytes(commit) - there, folder)
    download(commit, folder)


def _check_room(num_bytes: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ConfigError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and {num_bytes / 1e9:.1f} GB are needed; make room"
        )
