"""What a manifest says of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.replay import provenance
from harness.replay.provenance import git_state


def test_a_package_installed_inside_somebody_elses_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages = tmp_path / "lib" / "site-packages"
    site_packages.mkdir(parents=True)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]
    for words in (["init", "-q"], commit):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(provenance, "REPOSITORY", site_packages)
    assert git_state().sha is None
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    assert len(git_state().sha or "") == 40
