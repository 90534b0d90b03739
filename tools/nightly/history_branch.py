"""The branch that keeps the history: `make history-pull` and `make history-push`.

It shares no commit with the code. Files of a history are never changed, so that two pushes at one time merge
by taking the files of both: a push that was overtaken is made again. So a file that is missing here stays
there; `push --keep-days N` is what removes old ones from the branch.
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
from harness.history import store
from tools.nightly.github import download

BRANCH = "bench-history"
_REF = f"refs/heads/{BRANCH}"
"""`ls-remote` takes a bare name for the end of any: `feature/bench-history` has it too."""
NUM_TRIES = 5
_WHO = ("-c", "user.name=nightly", "-c", "user.email=nightly@users.noreply.github.com")
_HELPER = ("-c", "credential.helper=!gh auth git-credential")
"""The token is in GH_TOKEN, never in a file or on a command line."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.nightly.history_branch", description=__doc__)
    parser.add_argument("action", choices=("pull", "push"))
    parser.add_argument("--folder", type=Path, default=Path("history"))
    parser.add_argument("--remote", default="origin")
    parser.add_argument("--download", metavar="NAME", help="with push: fetch this artifact of RUN_ID first")
    parser.add_argument(
        "--keep-days", type=int, metavar="N", help="with push: remove older days from the branch"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        if args.download:
            download(args.download, args.folder)
        if args.action == "pull":
            return pull(args.folder, args.remote)
        return push(args.folder, args.remote, args.keep_days)
    except LabError as error:
        print(f"history: {error}", file=sys.stderr)
        return 2


def pull(folder: Path, remote: str) -> int:
    """Put the files of the branch into `folder`; a repository without the branch begins a history."""
    if not _git(*_HELPER, "ls-remote", remote, _REF):
        print(f"{remote} has no branch {BRANCH} yet: a history begins")
        folder.mkdir(parents=True, exist_ok=True)
        return 0
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        _clone(remote, tree)
        _copy(tree, folder)
    print(f"history of {remote}/{BRANCH}: {folder}")
    return 0


def push(folder: Path, remote: str, keep_days: int | None = None) -> int:
    """Add what `folder` holds to the branch, and remove what is older than `keep_days` from it.

    Raises:
        LabError: the remote refused.
    """
    for attempt in range(NUM_TRIES):
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name) / "tree"
            if _git(*_HELPER, "ls-remote", remote, _REF):
                _clone(remote, tree)
            else:
                _git("init", "--quiet", "--initial-branch", BRANCH, str(tree))
                _git("-C", str(tree), "remote", "add", "origin", _url(remote))
            _copy(folder, tree)
            if keep_days is not None:
                store.prune(tree, keep_days=keep_days)
            _git("-C", str(tree), "add", "--all")
            if not _git("-C", str(tree), "status", "--porcelain"):
                print("nothing new")
                return 0
            _git(*_WHO, "-C", str(tree), "commit", "--quiet", "-m", "Results of a night")
            try:
                _git(*_HELPER, "-C", str(tree), "push", "--quiet", "origin", f"HEAD:{_REF}")
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
