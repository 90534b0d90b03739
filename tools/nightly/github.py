"""Issues and comments, through the `gh` program: `make nightly-issue` and `make pr-comment`.

What is written is made of a verdict that was checked field by field. An issue that is open already gets a
comment, so that a week of one regression is one issue.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from adapters.base import LabError
from tools.nightly.verdict import HEADLINES, Verdict, read_verdict, to_markdown

MARK = "<!-- batching-lab bench -->"
"""First line of the comment, by which the next run finds it."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.nightly.github", description=__doc__)
    parser.add_argument("action", choices=("issue", "comment"))
    parser.add_argument("--verdict", type=Path, default=Path("nightly/verdict.json"))
    parser.add_argument("--run", default=os.environ.get("RUN_ID", ""), help="the run that measured")
    parser.add_argument("--download", metavar="NAME", help="fetch this artifact of the run first")
    parser.add_argument("--head", default=os.environ.get("HEAD_SHA", ""), help="of the pull request")
    parser.add_argument("--head-branch", default=os.environ.get("HEAD_BRANCH", ""), metavar="OWNER:BRANCH")
    parser.add_argument(
        "--run-failed",
        action="store_true",
        help="with issue: open one without a verdict, or for a pass, as well",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return _issue(args) if args.action == "issue" else _comment(args)
    except LabError as error:
        print(f"github: {error}", file=sys.stderr)
        return 2


def download(name: str, folder: Path, run: str | None = None) -> None:
    """Put an artifact of a run (default `RUN_ID`) into a folder.

    Raises:
        LabError: there is none, or no right to it.
    """
    number = _number(os.environ.get("RUN_ID", "") if run is None else run)
    _gh("run", "download", number, "--name", name, "--dir", str(folder))


def _issue(args: argparse.Namespace) -> int:
    """Open one, or comment on the open one, unless the verdict is a pass and the run did not fail."""
    try:
        verdict = _verdict(args)
        word, body = verdict.word, to_markdown(verdict, _link(args.run))
    except LabError as error:
        if not args.run_failed:
            raise
        word, body = "FAILED", f"The run ended without a verdict ({error}).\n\n{_link(args.run)}"
    if word == "pass" and not args.run_failed:
        print("no issue: the verdict is a pass")
        return 0
    # What failed then is a later step, or the job that keeps the history.
    is_later = args.run_failed and word in ("pass", "can't tell")
    title = f"Nightly: {'The run failed after the measurement' if is_later else HEADLINES[word]}"
    listed = json.loads(_gh("issue", "list", "--state", "open", "--limit", "200", "--json", "number,title"))
    known = next((entry["number"] for entry in listed if entry["title"] == title), None)
    if known is None:
        print(_gh("issue", "create", "--title", title, "--body", body))
    else:
        print(_gh("issue", "comment", str(known), "--body", body))
    return 0


def _comment(args: argparse.Namespace) -> int:
    """One comment on the pull request whose head was measured; a later run writes it anew."""
    verdict = _verdict(args)
    if not args.head or not all(letter in "0123456789abcdef" for letter in args.head):
        raise LabError("HEAD_SHA is not the name of a commit")
    # The number is asked of GitHub: in the artifact anybody could write another one. A commit is asked for
    # its pull requests in vain where it is a fork's; the branch of the fork has them.
    asked = ("--method", "GET", "repos/{owner}/{repo}/pulls", "-f", f"head={args.head_branch}")
    pulls = json.loads(_gh("api", *asked, "-f", "state=open"))
    number = next((p["number"] for p in pulls if p["head"]["sha"] == args.head), None)
    if number is None:
        print(f"no comment: no open pull request has the head {args.head[:12]}")
        return 0
    body = f"{MARK}\n{to_markdown(verdict, _link(args.run))}"
    comments = json.loads(_gh("api", f"repos/{{owner}}/{{repo}}/issues/{number}/comments?per_page=100"))
    known = next((entry["id"] for entry in comments if entry["body"].startswith(MARK)), None)
    where = f"issues/{number}/comments" if known is None else f"issues/comments/{known}"
    method = "POST" if known is None else "PATCH"
    _gh("api", "--method", method, f"repos/{{owner}}/{{repo}}/{where}", "-f", f"body={body}")
    print(f"commented on pull request {number}")
    return 0


def _verdict(args: argparse.Namespace) -> Verdict:
    if args.download:
        download(args.download, args.verdict.parent, args.run)
    return read_verdict(args.verdict)


def _link(run: str) -> str:
    repository = os.environ.get("GITHUB_REPOSITORY", "")
    if not (run and repository):
        return ""
    server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
    return (
        f"[Page, pictures and rows of this run]({server}/{repository}/actions/runs/{_number(run)}#artifacts)"
    )


def _number(run: str) -> str:
    if not run.isdecimal():
        raise LabError(f"the number of the run is needed (RUN_ID), not {run!r}")
    return run


def _gh(*words: str) -> str:
    """
    Raises:
        LabError: the program is missing or refused.
    """
    try:
        made = subprocess.run(["gh", *words], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise LabError("needs the program gh") from error
    except subprocess.CalledProcessError as error:
        raise LabError(f"gh {words[0]} {words[1]}: {error.stderr.strip() or error.returncode}") from error
    return made.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
