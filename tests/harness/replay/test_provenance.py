"""What a manifest says of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

from harness.replay.provenance import git_state


def test_a_package_installed_inside_somebody_elses_repository_has_no_commit(
    tmp_path: Path,
) -> None:
    site_packages = tmp_path / "lib" / "site-packages"
    site_packages.mkdir(parents=True)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]
    for words in (["init", "-q"], commit):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert git_state(site_packages).sha is None
    assert len(git_state(tmp_path).sha or "") == 40
