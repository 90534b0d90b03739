"""Measures this tree against another commit: every strategy under every backend, each pair in turns.

`python -m tools.nightly.measure` is `make nightly` and `make bench-pr`. A pair that cannot be told is
measured on until its share of the time is over; time that a pair leaves goes to those after it. The exit
status is that of the worst pair: 0 no regression, 1 a regression, 2 a measurement failed. Where the time is
over before there is a verdict it is 0 too, but never in silence: `can't tell` is in the summary, in a warning
and in the outputs of the step, and the workflow has a job and an issue of its own for it. A strategy or a
backend that the old commit lacks has nothing to be held against: its pairs are `new`, and not measured.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from adapters.base import ConfigError, LabError
from adapters.registry import BACKENDS
from harness.commands.options import parse_share
from harness.history.entries import entries_of
from harness.history.series import SHOWN
from harness.replay.interrupts import on_interrupt
from harness.results.metrics import FIGURES
from harness.results.steps import STEPS_SUFFIX
from services.strategies import VARIANTS
from tools.nightly.verdict import (
    EXIT_STATUS,
    Line,
    Pair,
    Verdict,
    Word,
    arm_name,
    backend_name,
    headline,
    to_markdown,
    write_verdict,
)

LAST_GOOD = "last_good"
"""The file in the history that names the last commit that passed."""
_KEYS = (*SHOWN, "request_time_ms")
_TELL_NAMES = (
    "from adapters.registry import BACKENDS\n"
    "from services.strategies import VARIANTS\n"
    "print(*BACKENDS, *VARIANTS)"
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.nightly.measure", description=__doc__)
    parser.add_argument("--against", metavar="REV", help="default: the last good commit, else HEAD~1")
    parser.add_argument("--variants", nargs="+", type=arm_name, default=[*VARIANTS], metavar="NAME")
    parser.add_argument(
        "--backends", nargs="+", type=backend_name, default=["torch", "llama_cpp"], metavar="NAME"
    )
    parser.add_argument("--budget-s", type=float, default=3600.0, metavar="S", help="for all pairs together")
    parser.add_argument("--max-regression", type=parse_share, default=0.05, metavar="SHARE")
    parser.add_argument("--out", type=Path, default=Path("nightly"))
    parser.add_argument("--history", type=Path, default=Path("history"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        verdict = measure(args)
        write_verdict(verdict, args.out / "verdict.json")
        if verdict.word == "pass":
            args.history.mkdir(parents=True, exist_ok=True)
            (args.history / LAST_GOOD).write_text(f"{verdict.new}\n")
    except LabError as error:
        print(f"nightly: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    _tell(verdict, args.out)
    return 0 if verdict.word == "can't tell" else EXIT_STATUS[verdict.word]


def measure(args: argparse.Namespace) -> Verdict:
    """
    Raises:
        ConfigError: there is no commit to hold this one against.
    """
    new = _sha_of("HEAD")
    old = find_old(args.against, args.history)
    print(f"new: {new}\nold: {old}", flush=True)
    started_s = time.monotonic()
    asked = [(backend, variant) for backend in args.backends for variant in args.variants]
    added = names_added_since(old)
    held = [pair for pair in asked if added.isdisjoint((pair[0], pair[1].partition("@")[0]))]
    pairs = [
        Pair(backend=backend, variant=variant, word="new", num_blocks=0, lines=())
        for backend, variant in asked
        if (backend, variant) not in held
    ]
    for index, (backend, variant) in enumerate(held):
        left_s = args.budget_s - (time.monotonic() - started_s)
        share_s = max(0.0, left_s / (len(held) - index))
        pairs.append(_measure_pair(old, backend, variant, share_s, args))
    took_s = time.monotonic() - started_s
    return Verdict(old=old, new=new, limit=args.max_regression, took_s=took_s, pairs=tuple(pairs))


def find_old(asked: str | None, history: Path) -> str:
    """The commit asked for; else the last good one, else the one before this, else this one.

    Raises:
        ConfigError: the one asked for is not in this repository.
    """
    if asked:
        return _sha_of(asked)
    kept = history / LAST_GOOD
    told = [kept.read_text().strip()] if kept.is_file() else []
    for revision in (*told, "HEAD~1", "HEAD"):
        try:
            return _sha_of(revision)
        except ConfigError as error:
            print(f"passed over: {error}")
    raise ConfigError("this is no git repository with a commit")


def names_added_since(old: str) -> set[str]:
    """Strategies and backends of this tree that the registries of the commit `old` lack.

    None are where its registries cannot be read: then its services say what is wrong with them.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["git", "archive", old, "adapters", "services"]
        archive = subprocess.run(words, capture_output=True, check=False).stdout
        try:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
                tree.extractall(folder, filter="data")
        except tarfile.TarError:
            return set()
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
        words = [sys.executable, "-c", _TELL_NAMES]
        told = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    return set() if told.returncode else {*BACKENDS, *VARIANTS} - {*told.stdout.split()}


def _measure_pair(old: str, backend: str, variant: str, share_s: float, args: argparse.Namespace) -> Pair:
    out = args.out / "results" / f"{backend}-{variant}"
    words = [sys.executable, "-m", "tools.cli", "gate", "--against-commit", old, "--variants", variant]
    words += ["--backend", backend, "--measure-on", f"{share_s:.0f}", "--out", str(out)]
    words += ["--max-regression", str(args.max_regression)]
    print(f"\n{variant} on {backend}, at most {share_s:.0f} s", flush=True)
    status = _run_to_its_end(words)
    word: Word = next((word for word, own in EXIT_STATUS.items() if own == status), "FAILED")
    num_blocks, lines = _lines_of(out)
    return Pair(backend=backend, variant=variant, word=word, num_blocks=num_blocks, lines=lines)


def _run_to_its_end(words: Sequence[str]) -> int:
    """Its exit status. Told to stop, it ends its services and takes its worktree away first.

    Raises:
        KeyboardInterrupt: it was told to stop.
    """
    process = subprocess.Popen(words)
    told: list[bool] = []

    def stop() -> None:
        told.append(True)
        process.send_signal(signal.SIGINT)

    with on_interrupt(stop):
        status = process.wait()
    if told:
        raise KeyboardInterrupt
    return status


def _lines_of(folder: Path) -> tuple[int, tuple[Line, ...]]:
    """Of the newest comparison in it; nothing where none was finished."""
    files = [path for path in folder.glob("compare/*.parquet") if not path.name.endswith(STEPS_SUFFIX)]
    for path in sorted(files, reverse=True):
        try:
            rows = entries_of(path).to_pylist()
        except LabError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        found = {row["metric"]: row for row in rows if row["kind"] == "comparison"}
        lines = tuple(
            Line(
                label=FIGURES[key].label,
                ratio=row["value"],
                low=row["low"],
                high=row["high"],
                higher_is_better=FIGURES[key].metric.higher_is_better,
            )
            for key in _KEYS
            if (row := found.get(key))
        )
        return max((row["num_blocks"] for row in found.values()), default=0), lines
    return 0, ()


def _tell(verdict: Verdict, out: Path) -> None:
    text = to_markdown(verdict)
    (out / "summary.md").write_text(text + "\n")
    print(f"\n{text}")
    for variable, written in (
        ("GITHUB_STEP_SUMMARY", text + "\n"),
        ("GITHUB_OUTPUT", f"verdict={verdict.word.replace(' ', '-').replace(chr(39), '').lower()}\n"),
    ):
        if path := os.environ.get(variable):
            with Path(path).open("a") as file:
                file.write(written)
    if verdict.word != "pass" and os.environ.get("GITHUB_ACTIONS"):
        level: Word | str = "warning" if verdict.word == "can't tell" else "error"
        print(f"::{level} title={headline(verdict).replace(':', ',')}::see the summary of this run")


def _sha_of(revision: str) -> str:
    words = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    if made.returncode:
        raise ConfigError(f"there is no commit {revision!r} here")
    return made.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
