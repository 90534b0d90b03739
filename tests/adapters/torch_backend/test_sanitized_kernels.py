"""The compiled kernels under an address sanitizer: their own tests, and random mixed load.

A compiler in front of the system's own adds the sanitizer, so what is built is the product's build. The
variables SANITIZED_S and SANITIZED_SEED make it longer and another one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

REPOSITORY = Path(__file__).resolve().parents[3]
SECONDS = float(os.environ.get("SANITIZED_S", "8"))
SEED = os.environ.get("SANITIZED_SEED", "1")
START_S = 150


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose kernels are built with the sanitizer, and watched by it."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ on Linux")
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the sanitizer has to find the C++ library when it starts
        asked = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"this compiler has no {name}")
        libraries.append(os.path.realpath(found))
    folder = tmp_path_factory.mktemp("compiler")
    # LD_PRELOAD is for the program that is watched, not for its compiler.
    script = f'#!/bin/sh\nunset LD_PRELOAD\nexec {compiler} -fsanitize=address -g1 "$@"\n'
    for name in ("c++", "g++"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "OMP_WAIT_POLICY": "PASSIVE",  # as in the service: threads that spin hinder one another
        "PYTHONMALLOC": "malloc",  # else small arrays of ctypes lie in blocks that Python shares out
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sanitized kernels are built once."""
    return tmp_path_factory.mktemp("sanitized")


def run(environment: dict[str, str], *words: str, timeout_s: float) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert "AddressSanitizer" not in done.stdout, done.stdout[-8000:]
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_an_overflow_is_seen(sanitized: dict[str, str], folder: Path) -> None:
    """Weights that are one panel short: without the sanitizer nobody would notice."""
    code = (
        "import sys, torch; from pathlib import Path; from adapters.torch_backend.cpu.kernels import *\n"
        "lab = load_kernels(Path(sys.argv[1]), torch.float32, 1)\n"
        "lab.norm(torch.ones(4, 512), torch.ones(496), 1e-5)"
    )
    words = [sys.executable, "-c", code, str(folder / "kernels")]
    done = subprocess.run(
        words, cwd=REPOSITORY, env=sanitized, capture_output=True, text=True, timeout=START_S
    )
    assert done.returncode == 99
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.timeout(START_S + 10 * SECONDS)
def test_mixed_load(sanitized: dict[str, str], folder: Path) -> None:
    load = "tests.adapters.torch_backend.sanitized_load"
    shown = run(sanitized, load, str(folder), str(SECONDS), SEED, timeout_s=START_S + 8 * SECONDS)
    print(f"\n{SECONDS:g} s: {shown.splitlines()[-1]}")


@pytest.mark.load
def test_their_own_tests(sanitized: dict[str, str]) -> None:
    tests = ["tests/adapters/torch_backend/test_cpu_kernels.py", "-k", "not compiler and not damaged"]
    shown = run(sanitized, "pytest", "-p", "no:cacheprovider", *tests, timeout_s=600)
    assert "passed" in shown
    print("\n" + shown.splitlines()[-1])
