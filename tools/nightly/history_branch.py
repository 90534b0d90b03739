"""The branch that keeps the history: `make history-pull` and `make history-push`.

It shares no commit with the code. Files of a history are never changed, so that two pushes at one time merge
by taking the files of both: a push that was overtaken is made again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from adapters.base import LabError
from tools.nightly.github import download

BRANCH = "bench-history"
NUM_TRIES = 5
_WHO = ("-c", "user.name=nightly", "-c", "user.email=nightly@users.noreply.github.com")
_HELPER = ("-c", "credential.helper=!gh auth git-credential")
"""The token is in GH_TOKEN, never in a file or on a command line."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.nightly.history_branch", description=__doc__)
    parser.add_argument("action", choices=("pull", "push"))
    parser.add_argument("--folder", type=Path, default=Path("history"))
    parser.add_argument("--remote", default="origin")
    parser.add_argument("--download", metavar="NAME", help="with push: fetch this artifact of RUN_ID first")
    args = parser.parse_args(argv)
    try:
        if args.download:
            download(args.download, args.folder)
        return pull(args.folder, args.remote) if args.action == "pull" else push(args.folder, args.remote)
    except LabError as error:
        print(f"history: {error}", file=sys.stderr)
        return 2


def pull(folder: Path, remote: str) -> int:
    """Put the files of the branch into `folder`; a repository without the branch begins a history."""
    if not _git(*_HELPER, "ls-remote", "--heads", remote, BRANCH):
        print(f"{remote} has no branch {BRANCH} yet: a history begins")
        folder.mkdir(parents=True, exist_ok=True)
        return 0
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        _clone(remote, tree)
        _copy(tree, folder)
    print(f"history of {remote}/{BRANCH}: {folder}")
    return 0


def push(folder: Path, remote: str) -> int:
    """Add what `folder` holds to the branch.

    Raises:
        LabError: the remote refused.
    """
    for attempt in range(NUM_TRIES):
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name) / "tree"
            if _git(*_HELPER, "ls-remote", "--heads", remote, BRANCH):
                _clone(remote, tree)
            else:
                _git("init", "--quiet", "--initial-branch", BRANCH, str(tree))
                _git("-C", str(tree), "remote", "add", "origin", _url(remote))
            _copy(folder, tree)
            _git("-C", str(tree), "add", "--all")
            if not _git("-C", str(tree), "status", "--porcelain"):
                print("nothing new")
                return 0
            _git(*_WHO, "-C", str(tree), "commit", "--quiet", "-m", "Results of a night")
            try:
                _git(*_HELPER, "-C", str(tree), "push", "--quiet", "origin", f"HEAD:{BRANCH}")
            except LabError:
                if attempt + 1 == NUM_TRIES:
                    raise
                continue
            print(f"pushed to {remote}/{BRANCH}")
            return 0
    return 2


def _clone(remote: str, tree: Path) -> None:
    words = (
        "clone",
        "--quiet",
        "--depth",
        "1",
        "--branch",
        BRANCH,
        "--single-branch",
        _url(remote),
        str(tree),
    )
    _git(*_HELPER, *words)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))


def _url(remote: str) -> str:
    return _git("remote", "get-url", remote)


def _git(*words: str) -> str:
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    made = subprocess.run(["git", *words], capture_output=True, text=True, check=False, env=env)
    if made.returncode:
        raise LabError(f"git: {made.stderr.strip() or made.returncode}")
    return made.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
