"""The wheel, in an environment of its own and away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.ops.servers import ROOT

pytestmark = [pytest.mark.ops, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv", path=f"{os.environ['PATH']}{os.pathsep}{ROOT / '.uv/bin'}")
    assert found, "uv is neither on the PATH nor in .uv: `make test-ops` brings it"
    return found


@pytest.fixture(scope="module")
def wheel(uv: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, so that nothing is missing there either."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([uv, "build", "--quiet", "--out-dir", folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_its_metadata_say_what_it_is(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == project["version"]
    for field in ("Summary", "Author", "License-Expression", "Keywords", "Requires-Python"):
        assert metadata[field], field
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    minors = {c.rpartition(".")[2] for c in metadata.get_all("Classifier") if ":: Python :: 3." in c}
    assert minors == {"11", "12", "13"}
    assert metadata.get_payload().startswith("# The batching lab")


def test_it_runs_in_an_empty_environment(uv: str, wheel: Path, tmp_path: Path) -> None:
    environment, work = tmp_path / "env", tmp_path / "work"
    work.mkdir()
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    python = environment / "bin/python"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, wheel], check=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def lab(*arguments: str) -> str:
        command = [environment / "bin/lab", *arguments]
        done = subprocess.run(command, cwd=work, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "lab-26m" in lab("model", "lab-26m")
    assert (work / "artifacts/models/lab-26m/config.json").is_file()
    lab("bench", "--backend", "null", "--requests", "16", "--concurrency", "4", "--floor", "0")
    (rows,) = (path for path in work.glob("results/*/*.parquet") if "steps" not in path.name)
    assert "16 answers" in lab("report", str(rows))
    where = "import services; print(services.__file__)"
    found = subprocess.run([python, "-c", where], cwd=work, env=clean, capture_output=True, text=True)
    assert found.stdout.startswith(str(environment)), found
