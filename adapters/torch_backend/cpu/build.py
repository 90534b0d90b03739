"""Builds the library of kernels once, with the system's own compiler.

The library's name holds a hash of the sources, the compiler and the CPU, so a library from another machine or
an older checkout is never loaded. It ends with a hash of the library itself: to load one that was cut off
would kill the process with SIGBUS, so that one is built anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "src"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
_MACHINE_FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-mcpu=native",), ())
"""Tried in turn; the last works everywhere, slower and on one thread."""
_COMPILE_TIMEOUT_S = 120


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of the CPU, by the names of torch 2.12."""
    try:
        found: Mapping[str, Any] = torch.cpu.get_capabilities()
    except AttributeError:  # torch < 2.12
        return {
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
        }
    return found


def built_library(folder: Path) -> Path:
    """The path of the library for this source, compiler and CPU.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or none that takes the source.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler found (looked for {', '.join(_COMPILERS)})")
    cpu = json.dumps(cpu_capabilities(), sort_keys=True, default=str)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10).stdout
    made_with = "\0".join([compiler, version, cpu, repr((_FLAGS, _MACHINE_FLAGS))])
    sources = [path.read_bytes() for path in sorted(_SOURCES.iterdir()) if path.is_file()]
    key = hashlib.sha256(b"\0".join([*sources, made_with.encode()])).hexdigest()
    stem = f"cpu_kernels-{key[:16]}-"
    for path in sorted(folder.glob(f"{stem}*.so")):
        if path.name == _named(stem, path):
            return path
        logger.warning("%s is damaged: building it again", path)
        path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        for flags in _MACHINE_FLAGS:
            command = [compiler, *_FLAGS, *flags, str(_SOURCES / "kernels.cpp"), "-o", name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
            if done.returncode == 0:
                logger.info("compiled the CPU kernels with %s %s", compiler, " ".join(flags))
                path = folder / _named(stem, Path(name))
                os.replace(name, path)
                return path
        raise OSError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}")
    finally:
        Path(name).unlink(missing_ok=True)


def _named(stem: str, library: Path) -> str:
    return f"{stem}{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"
