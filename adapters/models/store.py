"""From a model's name to a folder on this disk.

The name is a preset, a local folder, or a hub id, which is downloaded. A missing preset is made under
`<artifacts>/models/`, from a seed or of the file in a package. `:bf16` and the like after a name choose the
number format. Nothing here loads torch, so that the HTTP process can find a tokenizer quickly.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.base import BackendConfig, ConfigError, UnsupportedModel
from adapters.description import GGUF_FORMATS, HF_FORMATS
from adapters.models.artifact import Manifest, damaged_files, make_once, missing_files, read_manifest
from adapters.models.digests import (
    PRESET_MANIFEST,
    STAGED_MANIFEST,
    file_sha256,
    folder_digest,
    list_files,
    listing_digest,
)
from adapters.models.gguf_folder import write_folder
from adapters.models.hub import fetch_from_hub, looks_like_hub_id
from adapters.models.packaged import PACKAGED, UNPACK_RECIPE, packaged_file
from adapters.models.presets import CORPUS_PATH, PRESETS, RECIPE, Progress, write_model
from adapters.models.staging import wait_until_staged

if TYPE_CHECKING:
    from adapters.text.tokenizer import HFTokenizer

logger = logging.getLogger(__name__)

DEFAULT_MODEL_LEN = 4096


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model is. `format` is what stood after the colon, in the backend's spelling."""

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
    if is_preset(name):
        folder = preset_folder(name, config.artifacts_dir)
        if not is_current(folder):
            make_preset(name, config.artifacts_dir)
        return ModelFiles(folder, name, suffix, read_manifest(folder / PRESET_MANIFEST)["digest"])
    _refuse_typos(name)
    if name.endswith(".gguf"):
        raise ConfigError(f"MODEL={name} is a GGUF file, which BACKEND={config.backend} cannot read")
    local = Path(name).expanduser()
    wait_for_local(name, config)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(f"MODEL={name} has no config.json, so it is not a Hugging Face model folder")
        _refuse_damaged(local)
        return ModelFiles(local, local.resolve().name, suffix, folder_digest(local))
    if not looks_like_hub_id(name):
        raise ConfigError(
            f"MODEL={name} is neither a folder here, nor a preset ({', '.join(preset_names())}), nor a hub id"
        )
    snapshot = fetch_from_hub(name)
    return ModelFiles(snapshot, name, suffix, f"hub:{snapshot.name}")


def trained_positions(described: Mapping[str, object], name: str) -> int:
    """How many the model `name` says it has, in its `config.json`.

    Raises:
        UnsupportedModel: it does not say; a guess would run past positions that are learned.
    """
    found = described.get("max_position_embeddings") or described.get("n_positions")
    if not isinstance(found, int):
        raise UnsupportedModel(f"{name} does not say how many positions it has: use BACKEND=torch")
    return found


def pick_model_len(config: BackendConfig, trained: int, name: str) -> int:
    """MAX_MODEL_LEN, else as many positions as the model `name` is trained for, up to 4096.

    Raises:
        ConfigError: MAX_MODEL_LEN is beyond `trained`.
    """
    if config.max_model_len is not None and config.max_model_len > trained:
        raise ConfigError(f"MAX_MODEL_LEN={config.max_model_len} is beyond the {trained} positions of {name}")
    return config.max_model_len or min(trained, DEFAULT_MODEL_LEN)


def wait_for_local(name: str, config: BackendConfig) -> None:
    """Where MODEL is a path on this disk that is still being staged: wait for it.

    Raises:
        ConfigError: it did not appear in time.
    """
    path = Path(name).expanduser()
    in_artifacts = path.parts[:1] == Path(config.artifacts_dir).parts[:1]
    if path.is_absolute() or name.startswith(".") or in_artifacts or path.parent.is_dir():
        wait_until_staged(path, config.model_wait_s)


def _refuse_damaged(folder: Path) -> None:
    """The digest of a folder samples large files, so a staged one is held to its manifest as well."""
    manifest = folder / STAGED_MANIFEST
    if manifest.exists() and not read_manifest(manifest):
        raise ConfigError(f"{manifest} is damaged; remove {folder} and stage it again")
    for path in missing_files(manifest) or damaged_files(manifest):
        raise ConfigError(f"{path} is damaged: it is not what was staged; remove {folder} and stage it again")


def preset_names() -> list[str]:
    """Of the seeded models and of those that a package carries."""
    return [*PRESETS, *PACKAGED]


def is_preset(name: str) -> bool:
    return name in PRESETS or name in PACKAGED


def preset_folder(name: str, artifacts_dir: str) -> Path:
    return Path(artifacts_dir) / "models" / name


def is_current(folder: Path) -> bool:
    """Whether a preset is made, and its files are still what they were; reads those not compared yet."""
    if not is_made(folder):
        return False
    damaged = damaged_files(folder / PRESET_MANIFEST)
    for path in damaged:
        logger.warning("%s is damaged: it is not what %s says", path, PRESET_MANIFEST)
    return not damaged


def is_made(folder: Path) -> bool:
    """Whether a preset is whole and made by today's recipe from today's sources; reads no weights."""
    manifest = read_manifest(folder / PRESET_MANIFEST)
    if not manifest.get("files") or any(manifest.get(k) != v for k, v in _recipe(folder.name).items()):
        return False
    return not missing_files(folder / PRESET_MANIFEST)


def _recipe(name: str) -> Manifest:
    """What the manifest of a preset says of how it was made."""
    if name in PACKAGED:
        return {"recipe": UNPACK_RECIPE, **PACKAGED[name].origin}
    corpus = {"corpus_sha256": file_sha256(CORPUS_PATH)} if CORPUS_PATH.is_file() else {}
    return {"recipe": RECIPE, **corpus}


def make_preset(name: str, artifacts_dir: str, *, force: bool = False) -> Path:
    """Make a preset, unless it is there already (another process may just have made it).

    Raises:
        ConfigError: the folder cannot be written, the disk is too small or the package is not installed.
    """
    folder = preset_folder(name, artifacts_dir)
    packaged = PACKAGED.get(name)
    num_parameters = packaged.num_parameters if packaged else PRESETS[name].num_parameters

    def make(unfinished: Path) -> Manifest:
        num_bytes = num_parameters * (4 if packaged else 2)
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes + (64 << 20):
            raise ConfigError(
                f"{name} needs {num_bytes / 1e9:.1f} GB in {folder.parent} and {free / 1e9:.1f} GB "
                f"are free; make room, or set ARTIFACTS_DIR to another disk"
            )
        logger.info("making %s (%.2f GB) in %s", name, num_bytes / 1e9, folder)
        started = time.monotonic()
        if packaged:
            write_folder(packaged_file(name), unfinished, packaged.eos_token_ids)
        else:
            write_model(name, unfinished, _log_progress(name))
        files = list_files(unfinished)
        digest = listing_digest(files)
        logger.info("made %s in %.1f s, %s", name, time.monotonic() - started, digest)
        return {
            "name": name,
            "digest": digest,
            "num_parameters": num_parameters,
            **_recipe(name),
            "files": files,
        }

    try:
        make_once(folder, folder / PRESET_MANIFEST, make, lambda: not force and is_current(folder))
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be made in {folder}: {error}; set ARTIFACTS_DIR elsewhere"
        ) from error
    return folder


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
    if not name or not (is_format or is_preset(name)):
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
    near = difflib.get_close_matches(name.lower(), preset_names(), n=1, cutoff=0.75)
    if "/" not in name and not Path(name).exists() and (near or name.startswith("lab-")):
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(preset_names())}"
        raise ConfigError(f"MODEL={name} is not a preset; {hint}")


def made_folder(files: ModelFiles, artifacts_dir: str, kind: str) -> Path:
    """Where what is made of a folder is kept, beside the presets; other folders may share a name, so part of
    their path is added."""
    models = Path(artifacts_dir) / "models"
    name = files.name.replace("/", "--")
    if files.folder.parent != models:
        name += "-" + hashlib.sha256(str(files.folder.resolve()).encode()).hexdigest()[:8]
    return models / f"{name}-{kind}"
