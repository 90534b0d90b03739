"""Another commit of this repository, put beside it for as long as its services are measured.

It shares the environment of this tree where both have the same uv.lock, and the working directory in any
case: `.env`, models and results are those of this tree, only the code differs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.base import ConfigError
from harness.plan.corpus import REPOSITORY

_SYNC_TIMEOUT_S = 1800
_GIT_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Checkout:
    folder: Path
    sha: str
    python: str
    """The interpreter that has the packages of this commit."""
    packages: str
    """One clause on where these packages are."""

    @property
    def env(self) -> Mapping[str, str]:
        """What makes Python take our packages from `folder`, whatever the working directory holds."""
        return {"PYTHONPATH": str(self.folder), "PYTHONSAFEPATH": "1"}


@contextmanager
def checked_out(revision: str, extras: Sequence[str]) -> Iterator[Checkout]:
    """A temporary git worktree of `revision`; `extras` are installed too where packages have to be.

    Raises:
        ConfigError: there is no such commit, or its packages cannot be installed.
    """
    sha = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", failed=f"no commit {revision!r}")
    with tempfile.TemporaryDirectory(prefix="lab-commit-") as name:
        folder = Path(name).resolve() / "tree"
        add = ("-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", str(folder), sha)
        _git(*add, failed=f"{revision} cannot be checked out")
        try:
            yield Checkout(folder, sha, *_python_of(folder, extras))
        finally:
            _git("worktree", "remove", "--force", str(folder), failed=f"{folder} cannot be removed")


def _python_of(folder: Path, extras: Sequence[str]) -> tuple[str, str]:
    theirs, ours = ((tree / "uv.lock").read_bytes() for tree in (folder, REPOSITORY))
    if theirs == ours:
        return sys.executable, "the same uv.lock, so both run in this environment"
    uv = shutil.which("uv") or str(REPOSITORY / ".uv" / "bin" / "uv")
    words = [uv, "sync", "--frozen", "--no-dev", "--project", str(folder), "--python", sys.executable]
    for extra in extras:
        words += ["--extra", extra]
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    env["UV_PROJECT_ENVIRONMENT"] = str(folder / ".venv")
    _call(words, _SYNC_TIMEOUT_S, "uv.lock differs, and the packages of that commit cannot be installed", env)
    return str(folder / ".venv" / "bin" / "python"), "another uv.lock, so its packages were installed for it"


def _git(*arguments: str, failed: str) -> str:
    return _call(["git", "-C", str(REPOSITORY), *arguments], _GIT_TIMEOUT_S, failed, None)


def _call(words: Sequence[str], timeout_s: float, failed: str, env: Mapping[str, str] | None) -> str:
    try:
        made = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=True, env=env)
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
        raise ConfigError(f"{failed}: {last[0]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{failed}: {error}") from error
    return made.stdout.strip()
