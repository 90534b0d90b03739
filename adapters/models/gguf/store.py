"""From a model's name to one GGUF file on this disk.

The name is a .gguf file here or in a hub repository, or whatever `adapters.models.store` finds as a Hugging
Face folder: that is exported once and quantized to the format after the colon. Files made here lie under
`<artifacts>/models/<name>-gguf/`.
Where a package carries the model as a GGUF file, that file itself is one of the formats, and the default.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters.base import BackendConfig, ConfigError
from adapters.description import GGUF_FORMATS
from adapters.models.artifact import Manifest, damaged, make_once, read_manifest
from adapters.models.digests import file_digest, file_sha256
from adapters.models.hub import fetch_file_from_hub, gguf_in_hub
from adapters.models.packaged import PACKAGED, PackagedModel, packaged_file
from adapters.models.store import (
    ModelFiles,
    is_preset,
    made_folder,
    resolve_model,
    split_format,
    wait_for_local,
)

logger = logging.getLogger(__name__)

DEFAULT_FORMAT = "q4_k_m"
EXPORT_RECIPE = 1
"""Goes up when the same weights would get another file; a file of another recipe is made anew."""

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_DTYPES = {"float32": "f32", "fp32": "f32", "float16": "f16", "fp16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class GgufFile:
    """`folder` is the Hugging Face folder that the file was made from; None for a foreign file."""

    path: Path
    name: str
    digest: str
    folder: Path | None


def is_gguf_name(model: str) -> bool:
    """Whether MODEL names a GGUF file itself, here or on the hub, or a folder that holds one model."""
    return model.endswith(".gguf") or _only_gguf(Path(model).expanduser()) is not None


def resolve_gguf(config: BackendConfig) -> GgufFile:
    """Find, download or make the file that the configuration names.

    Raises:
        ConfigError: there is no such model or format, or it cannot be fetched or made; says what to do.
        BackendError: llama.cpp cannot quantize it.
    """
    name, _ = split_format(config, GGUF_FORMATS)
    if not is_preset(name):
        wait_for_local(name, config)
    if is_gguf_name(config.model):
        parts = gguf_parts(find_gguf(config.model))
        name = _PART.sub("", parts[0].stem)
        if len(parts) == 1:
            return GgufFile(parts[0], name, file_digest(parts[0]), None)
        listing = "".join(f"{file_digest(part)}  {part.name}\n" for part in parts)
        kind = "sampled-sha256" if "sampled" in listing else "sha256"
        return GgufFile(parts[0], name, f"{kind}:{hashlib.sha256(listing.encode()).hexdigest()}", None)
    files = resolve_model(config, GGUF_FORMATS)
    packaged = PACKAGED.get(name)
    default = packaged.file_format if packaged else DEFAULT_FORMAT
    return gguf_made_from(files, _format(files, config.dtype, default), config, packaged)


def find_gguf(model: str) -> Path:
    """The path of a foreign GGUF file, which is downloaded where MODEL says `owner/repository/file.gguf`.

    Raises:
        ConfigError: it is not here, and not on the hub or out of reach.
    """
    local = Path(model).expanduser()
    inside = _only_gguf(local)
    if inside is not None:
        return inside
    if local.is_file():
        return local
    in_hub = gguf_in_hub(model)
    if in_hub is None:
        raise ConfigError(
            f"MODEL={model} does not exist; give the path of a .gguf file, or owner/repository/file.gguf "
            "for one of the hub"
        )
    return fetch_file_from_hub(*in_hub)


def gguf_parts(path: Path) -> list[Path]:
    """All files of a model that is split as llama.cpp splits it, or `path` alone; llama.cpp takes the first.

    Raises:
        ConfigError: a part is missing.
    """
    match = _PART.search(path.stem)
    if match is None:
        return [path]
    num_parts, stem = int(match[2]), path.stem[: match.start()]
    parts = [path.with_name(f"{stem}-{part:05}-of-{match[2]}.gguf") for part in range(1, num_parts + 1)]
    for part in parts:
        if not part.is_file():
            raise ConfigError(f"{part} is missing: the model is split into {num_parts} files")
    return parts


def _only_gguf(folder: Path) -> Path | None:
    """The file, or one of the parts, of the one model in a folder."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    found = sorted(folder.glob("*.gguf"))
    models = {_PART.sub("", path.stem) for path in found}
    return found[0] if len(models) == 1 else None


def _format(files: ModelFiles, dtype: str, default: str) -> str:
    """The suffix of MODEL, else DTYPE, else `default`.

    Raises:
        ConfigError: DTYPE is no format of GGUF.
    """
    wanted = files.format or (default if dtype == "auto" else _DTYPES.get(dtype, dtype))
    if wanted not in GGUF_FORMATS:
        raise ConfigError(f"DTYPE={dtype}: BACKEND=llama_cpp has {', '.join(GGUF_FORMATS)}")
    return wanted


def gguf_made_from(
    files: ModelFiles, file_format: str, config: BackendConfig, packaged: PackagedModel | None
) -> GgufFile:
    """The file of a Hugging Face folder in this format, made unless it is there.

    Raises:
        ConfigError, UnsupportedModel, BackendError: as `make_gguf`.
    """
    folder = made_folder(files, config.artifacts_dir, "gguf")
    path = folder / f"{folder.name.removesuffix('-gguf')}-{file_format}.gguf"
    if not _is_current(path, files.digest):
        shipped = packaged if packaged and packaged.file_format == file_format else None
        make_gguf(files, file_format, path, config.num_threads or 1, shipped)
    return GgufFile(path, files.name, read_manifest(_manifest(path))["digest"], files.folder)


def make_gguf(
    files: ModelFiles, file_format: str, path: Path, num_threads: int, shipped: PackagedModel | None = None
) -> None:
    """Export `files` and quantize the export, or copy the file that was `shipped` in this format.

    Another process may do the same at the same time.

    Raises:
        ConfigError: the folder cannot be written, or `files` is no Llama model.
        BackendError: llama.cpp cannot quantize it.
    """
    from adapters.models.gguf.export import export_gguf, own_format

    def make(path: Path, write: Callable[[Path], None]) -> None:
        def write_described(unfinished: Path) -> Manifest:
            write(unfinished)
            return {
                "recipe": EXPORT_RECIPE,
                "source_digest": files.digest,
                "bytes": unfinished.stat().st_size,
                "sha256": file_sha256(unfinished),
                "digest": file_digest(unfinished),
                **(shipped.origin if shipped else {}),
            }

        started = time.monotonic()
        if make_once(path, _manifest(path), write_described, lambda: _is_current(path, files.digest)):
            logger.info("made %s in %.1f s", path, time.monotonic() - started)

    def export(unfinished: Path) -> None:
        logger.info("exporting %s to %s", files.folder, exported)
        export_gguf(files.folder, unfinished, files.name)

    def export_f16(unfinished: Path) -> None:
        logger.info("exporting %s to %s", files.folder, path)
        export_gguf(files.folder, unfinished, files.name, as_f16=True)

    def copy_shipped(unfinished: Path) -> None:
        shutil.copyfile(packaged_file(files.name), unfinished)

    def quantize_export(unfinished: Path) -> None:
        from adapters.models.gguf.quantize import quantize

        make(exported, export)
        logger.info("quantizing %s to %s", exported, path)
        quantize(exported, unfinished, file_format, num_threads)

    try:
        own = own_format(files.folder)
        exported = path.with_name(path.name.replace(f"-{file_format}.gguf", f"-{own}.gguf"))
        if shipped:
            make(path, copy_shipped)
        elif path == exported:
            make(path, export)
        else:  # f16 is a plain cast, and so needs no llama.cpp
            make(path, export_f16 if file_format == "f16" else quantize_export)
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error}; set ARTIFACTS_DIR elsewhere") from error


def _manifest(path: Path) -> Path:
    return path.with_suffix(".json")


def _is_current(path: Path, source_digest: str) -> bool:
    manifest = read_manifest(_manifest(path))
    is_whole = (
        manifest.get("recipe") == EXPORT_RECIPE
        and manifest.get("source_digest") == source_digest
        and path.is_file()
        and path.stat().st_size == manifest.get("bytes")
    )
    sha256 = manifest.get("sha256") or str(manifest.get("digest")).removeprefix("sha256:")
    if not is_whole or sha256.startswith("sampled"):  # of a large file that was made before it had its own
        return is_whole
    is_damaged = bool(damaged({path: sha256}, path))
    if is_damaged:
        logger.warning("%s is damaged: it is not what %s says", path, _manifest(path).name)
    return not is_damaged
