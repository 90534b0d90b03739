"""The import contracts of pyproject.toml hold, and each kind of them notices an import that runs back."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLANTS = {
    "adapters/text/tokenizer.py": "import adapters.models.store",
    "services/engine/scheduler.py": "import time",
    "services/engine/limits.py": "import services.engine.scheduler",
    "services/engine/messages.py": "import services.http.app",
    "services/engine_client/wire.py": "import services.engine_client.supervisor",
    "services/http/access.py": "import services.http.app",
    "services/strategies/static.py": "import services.strategies.dynamic",
    "services/contract/timings.py": "import adapters.base",
    "services/core/service.py": "import adapters.torch_backend.backend",
    "harness/plan/corpus.py": "import harness.client.stream",
    "harness/results/slo.py": "import harness.replay.replay",
    "harness/comparing/verdict.py": "import harness.comparing.compare_runs",
    "harness/measure.py": "import services.engine.engine",
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("adapters", "services", "harness", "tools"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_an_import_that_runs_back_is_noticed(copy: Path) -> None:
    run = lint(copy)
    assert run.returncode == 0, run.stdout
    for name, planted in PLANTS.items():
        path = copy / name
        source = path.read_text(encoding="utf-8")
        path.write_text(f"{source}\n\n{planted}\n", encoding="utf-8")
        run = lint(copy)
        path.write_text(source, encoding="utf-8")
        assert run.returncode == 1, f"{planted} in {name} was let through"
        assert planted.removeprefix("import ") in run.stdout
