"""`lab model`: makes a preset, or fetches another model, before it is needed.

`lab serve` does the same by itself when the model is missing. `lab model stage` is in `tools/stage_model.py`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

from adapters.base import BackendConfig, ConfigError
from adapters.models.artifact import changed_files, read_manifest
from adapters.models.digests import PRESET_MANIFEST
from adapters.models.gguf.store import resolve_gguf
from adapters.models.packaged import PACKAGED
from adapters.models.presets import PRESETS
from adapters.models.store import (
    is_made,
    is_preset,
    make_preset,
    preset_folder,
    preset_names,
    resolve_model,
)
from adapters.registry import BACKENDS
from harness.settings import SETTING_NAMES
from services.read_settings import read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[stage] NAME",
        help="a preset, a local folder, a .gguf file or a hub id; `stage` puts it into the folder of --to",
    )
    parser.add_argument("--artifacts-dir", help="where presets are kept")
    parser.add_argument("--backend", help="whose files are wanted: llama_cpp makes or stages a GGUF file")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where `stage` puts the model")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show the presets and which of them are made")
    action.add_argument("--force", action="store_true", help="make the preset anew even if it is there")
    action.add_argument("--verify", action="store_true", help="compare each file of a preset with its digest")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    is_staged = args.words[:1] == ["stage"]
    names = args.words[is_staged:]
    if len(names) > 1:
        raise ConfigError(f"one model at a time: {' '.join(names)}")
    if is_staged != (args.to is not None):
        raise ConfigError("write it as `lab model stage MODEL --to FOLDER`")
    settings = read_settings(
        {
            "model": names[0] if names else None,
            "artifacts_dir": args.artifacts_dir,
            "backend": args.backend,
        },
        passed_over=SETTING_NAMES,
    )
    config = settings.engine_spec().backend
    if BACKENDS[config.backend].weights == "none":  # it needs no model, but one was asked for
        config = replace(config, backend=BackendConfig().backend)
    if is_staged:
        from tools import stage_model

        return stage_model.run(config, args.to)
    if args.list:
        return _list(config.artifacts_dir)
    started = time.monotonic()
    preset = config.model.partition(":")[0]
    if args.verify:
        return _verify(preset, config.artifacts_dir)
    if args.force and is_preset(preset):
        make_preset(preset, config.artifacts_dir, force=True)
    return _resolve(config, started)


def _resolve(config: BackendConfig, started: float) -> int:
    if BACKENDS[config.backend].weights == "gguf":
        file = resolve_gguf(config)
        print(f"{file.name}: {file.path}")
        size = file.path.stat().st_size
        print(f"{size / 1e6:,.1f} MB, {file.digest}, {time.monotonic() - started:.1f} s")
        return 0
    files = resolve_model(config, BACKENDS[config.backend].formats)
    print(f"{files.name}: {files.folder}")
    print(f"{_num_bytes(files.folder) / 1e6:,.1f} MB, {files.digest}, {time.monotonic() - started:.1f} s")
    return 0


def _list(artifacts_dir: str) -> int:
    shapes = {
        name: (p.num_parameters, f"{p.num_layers} layers of {p.hidden_size}, vocabulary {p.vocab_size:,}")
        for name, p in PRESETS.items()
    }
    shapes |= {name: (model.num_parameters, model.shape) for name, model in PACKAGED.items()}
    for name, (num_parameters, shape) in shapes.items():
        folder = preset_folder(name, artifacts_dir)
        state = (
            f"{folder}, {read_manifest(folder / PRESET_MANIFEST)['digest']}"
            if is_made(folder)
            else "not made"
        )
        print(f"{name:12} {num_parameters / 1e6:8,.1f} M parameters, {shape}: {state}")
    return 0


def _verify(preset: str, artifacts_dir: str) -> int:
    if not is_preset(preset):
        raise ConfigError(f"only presets can be verified: {', '.join(preset_names())}")
    folder = preset_folder(preset, artifacts_dir)
    if not is_made(folder):
        return _told(f"{folder} is missing or out of date; `lab model {preset}` makes it")
    changed = changed_files(folder / PRESET_MANIFEST)
    if changed:
        listed = ", ".join(changed)
        return _told(f"{folder} has changed ({listed}); `lab model {preset} --force` makes it anew")
    print(f"{folder} is intact, {read_manifest(folder / PRESET_MANIFEST)['digest']}")
    return 0


def _told(problem: str) -> int:
    """What `--verify` found; the exit status for it."""
    print(f"lab model: {problem}", file=sys.stderr)
    return 1


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


if __name__ == "__main__":
    from tools.cli import main

    raise SystemExit(main(["model", *sys.argv[1:]]))
