"""From a Hugging Face folder to an ONNX decoder, by onnxruntime-genai's builder in a process of its own.

The builder needs torch and transformers; what it makes needs onnxruntime alone. It is told to compute logits
for the last position only, so that a prompt does not pay for the whole vocabulary at each token. The graph is
always the one for CPUs: the builder's others have other inputs, and keys and values in fp16.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from adapters.base import BackendError, ConfigError
from adapters.models.artifact import Manifest, damaged_files, make_once, read_manifest
from adapters.models.digests import list_files
from adapters.models.store import ModelFiles, made_folder

logger = logging.getLogger(__name__)

RECIPE = 1
"""Goes up when the same weights would get another export."""
_MANIFEST = "lab_onnx.json"


def exported_model(files: ModelFiles, precision: str, artifacts_dir: str) -> Path:
    """The `model.onnx` of a folder in this precision, exported unless it is there.

    Raises:
        ConfigError: it cannot be written.
        BackendError: the builder failed; the message repeats its last line.
    """
    folder = made_folder(files, artifacts_dir, f"onnx-cpu-{precision}")
    manifest = folder / _MANIFEST

    def is_current() -> bool:
        made = read_manifest(manifest)
        is_same = made.get("recipe") == RECIPE and made.get("source_digest") == files.digest
        return is_same and not damaged_files(manifest)

    def make(unfinished: Path) -> Manifest:
        logger.info("exporting %s to %s", files.folder, folder)
        started = time.monotonic()
        _build(files.folder, unfinished, precision)
        logger.info("exported in %.1f s", time.monotonic() - started)
        return {"recipe": RECIPE, "source_digest": files.digest, "files": list_files(unfinished)}

    try:
        make_once(folder, manifest, make, is_current)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error}; set ARTIFACTS_DIR elsewhere") from error
    return folder / "model.onnx"


def _build(source: Path, target: Path, precision: str) -> None:
    for package in ("torch", "transformers", "onnx_ir", "onnxruntime_genai"):
        import_module(package)  # a missing one is named here, not in the builder's log
    with tempfile.TemporaryDirectory(prefix="lab-onnx-") as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
        command += ["-o", str(target), "-p", precision, "-e", "cpu", "-c", cache]
        command += ["--extra_options", "prune_lm_head=true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (target / "model.onnx").is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BackendError(
            f"{source} cannot be exported to ONNX: {lines[-1] if lines else 'no reason given'}"
        )
