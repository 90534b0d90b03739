"""From a model's name to a folder on this disk.

What enters is a `BackendConfig`; what leaves is a `ModelFiles`. The name is a seeded preset, which is made
when it is missing, a local folder, or a hub id, which is downloaded; `:bf16` and the like after a preset
choose its number format. Presets appear under `<artifacts>/models/` whole or not at all, also when several
processes ask at once. Reads no weights into memory and loads no torch.
"""

from __future__ import annotations

import difflib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from adapters.base import BackendConfig, ConfigError
from adapters.description import GGUF_FORMATS, HF_FORMATS
from adapters.models.hub import fetch_from_hub, looks_like_hub_id
from adapters.models.manifest import folder_digest, is_current, read_manifest, write_manifest
from adapters.models.presets import PRESETS, Progress, write_model
from adapters.models.staging import wait_until_staged

if TYPE_CHECKING:
    from adapters.text.tokenizer import HFTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model lies. `format` is what stood after the colon, in the backend's spelling."""

    folder: Path
    name: str
    format: str | None
    digest: str
    """`sha256:` over all files; `sampled-sha256:` where large ones were only sampled; `hub:` a commit."""


def resolve_model(config: BackendConfig, formats: Mapping[str, str] = HF_FORMATS) -> ModelFiles:
    """Find, make or download the model that the configuration names; `formats` are those of the backend.

    Raises:
        ConfigError: there is no such model, or it cannot be fetched or written; says what to do.
    """
    name, suffix = split_format(config, formats)
    if name in PRESETS:
        folder = preset_folder(name, config.artifacts_dir)
        if not is_current(folder):
            make_preset(name, config.artifacts_dir)
        return ModelFiles(folder, name, suffix, read_manifest(folder)["digest"])
    _refuse_typos(name)
    if name.endswith(".gguf"):
        raise ConfigError(f"MODEL={name} is a GGUF file, which BACKEND={config.backend} cannot read")
    local = Path(name).expanduser()
    wait_for_local(name, config)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(f"MODEL={name} has no config.json, so it is not a Hugging Face model folder")
        return ModelFiles(local, local.resolve().name, suffix, folder_digest(local))
    if not looks_like_hub_id(name):
        raise ConfigError(
            f"MODEL={name} is neither a folder here, nor a preset ({', '.join(PRESETS)}), nor a hub id"
        )
    snapshot = fetch_from_hub(name)
    return ModelFiles(snapshot, name, suffix, f"hub:{snapshot.name}")


def wait_for_local(name: str, config: BackendConfig) -> None:
    """Where MODEL is a place on this disk that is still being staged: wait for it.

    Raises:
        ConfigError: it did not appear in time.
    """
    path = Path(name).expanduser()
    in_artifacts = path.parts[:1] == Path(config.artifacts_dir).parts[:1]
    if path.is_absolute() or name.startswith(".") or in_artifacts or path.parent.is_dir():
        wait_until_staged(path, config.model_wait_s)


def preset_folder(name: str, artifacts_dir: str) -> Path:
    return Path(artifacts_dir) / "models" / name


def make_preset(name: str, artifacts_dir: str, *, force: bool = False) -> Path:
    """Make a preset, unless it is there already (another process may just have made it).

    Raises:
        ConfigError: the folder cannot be written or the disk is too small.
    """
    folder = preset_folder(name, artifacts_dir)
    num_bytes = 2 * PRESETS[name].num_parameters
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            if force or not is_current(folder):
                free = shutil.disk_usage(folder.parent).free
                if free < num_bytes + (64 << 20):
                    raise ConfigError(
                        f"{name} needs {num_bytes / 1e9:.1f} GB in {folder.parent} and {free / 1e9:.1f} GB "
                        f"are free; make room, or set ARTIFACTS_DIR to another disk"
                    )
                logger.info("making %s (%.2f GB) in %s", name, num_bytes / 1e9, folder)
                started = time.monotonic()
                with _replacing(folder) as unfinished:
                    write_model(name, unfinished, _log_progress(name))
                    digest = write_manifest(name, unfinished)
                logger.info("made %s in %.1f s, %s", name, time.monotonic() - started, digest)
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be made in {folder}: {error}; set ARTIFACTS_DIR elsewhere"
        ) from error
    return folder


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` if the block ends well. Call under the lock."""
    for leftover in folder.parent.glob(f".making-{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".making-{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if folder.exists():
            folder.rename(unfinished / ".replaced")
        unfinished.rename(folder)
        shutil.rmtree(folder / ".replaced", ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _log_progress(name: str) -> Progress:
    """Log each tenth of a model that takes long enough to make one wonder."""
    last_tenth = 0

    def progress(done: int, total: int) -> None:
        nonlocal last_tenth
        tenth = 10 * done // total
        if total > 1 << 30 and tenth > last_tenth:
            last_tenth = tenth
            logger.info("making %s: %d%%", name, 10 * tenth)

    return progress


def split_format(config: BackendConfig, formats: Mapping[str, str]) -> tuple[str, str | None]:
    """The name of the model, and the format behind its last colon in the backend's spelling.

    Raises:
        ConfigError: the backend has no such format.
    """
    name, _, suffix = config.model.rpartition(":")
    is_format = any(suffix in known for known in (formats, HF_FORMATS, GGUF_FORMATS))
    if not name or not (is_format or name in PRESETS):
        return config.model, None
    if suffix not in formats:
        known = ", ".join(dict.fromkeys(formats.values()))
        raise ConfigError(
            f"MODEL={config.model}: BACKEND={config.backend} has no format {suffix}; it has {known}"
        )
    return name, formats[suffix]


def load_tokenizer(config: BackendConfig, formats: Mapping[str, str] = HF_FORMATS) -> HFTokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        ConfigError: as `resolve_model`, or the folder has no tokenizer that can be read.
    """
    from adapters.text.tokenizer import HFTokenizer

    return HFTokenizer.from_folder(resolve_model(config, formats).folder)


def _refuse_typos(name: str) -> None:
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.75)
    if "/" not in name and not Path(name).exists() and (near or name.startswith("lab-")):
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise ConfigError(f"MODEL={name} is not a preset; {hint}")
