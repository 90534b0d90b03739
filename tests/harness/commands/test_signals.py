"""`lab bench` and `lab compare` told to stop, or killed, at random moments from their start to their end.

SIGNALS is how many, SIGNALS_SEED draws the moments. Afterwards nothing runs that they started, and every row
that was in a journal or a file, and every run of a ledger, can still be had.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from adapters.base import LabError
from harness.results.line_file import read_records
from harness.results.manifest import ComparisonManifest
from harness.results.record import JOURNAL_SUFFIX, read_journal, read_parquet
from tests.harness.commands.test_bench import REPOSITORY, write_corpus

NUM_SIGNALS = int(os.environ.get("SIGNALS", "3"))
SEED = int(os.environ.get("SIGNALS_SEED", "1"))
END_S = 60.0
NUM_REQUESTS = 60
CASES = [
    ["bench", "--concurrency", "4", "--repeats", "2"],
    [
        "compare",
        "--loads",
        "closed",
        "--concurrency",
        "4",
        "--variants",
        "baseline",
        "continuous",
        "--blocks",
        "1",
    ],
    ["bench", "--rate", "60", "--processes", "2"],
    ["compare", "--rate", "60", "--variants", "static@PAD_FINISHED=0", "continuous", "--blocks", "1"],
]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


def rows_below(out: Path) -> set[str]:
    """Request ids of all rows that are kept, in files and in journals."""
    found: set[str] = set()
    for path in [*out.rglob("*.parquet"), *out.rglob("*" + JOURNAL_SUFFIX)]:
        if path.name.endswith(".steps.parquet") or path.parent.name == "compare":
            continue
        try:
            rows = read_journal(path).rows.to_pandas() if path.suffix == ".jsonl" else read_parquet(path)[1]
        except LabError:
            if path.exists() and path.suffix == ".parquet":
                raise
            continue  # a journal that is being turned into its file, or holds no line yet
        found |= set(rows.loc[~rows["error"].str.startswith("interrupted", na=False), "request_id"])
    return found


def num_lines_below(out: Path) -> int:
    """About the number of rows that were ever in a journal; cheap."""
    done = len([path for path in out.rglob("*.parquet") if not path.name.endswith(".steps.parquet")])
    return done * NUM_REQUESTS + sum(
        path.read_bytes().count(b"\n") for path in out.rglob("*" + JOURNAL_SUFFIX)
    )


def runs_below(out: Path) -> set[str]:
    """The files that ledgers name, but for INVALID runs, which are made again."""
    entries = [entry for path in out.rglob("*.runs.jsonl") for _, entry in read_records(path)[0]]
    manifests = {entry["path"]: read_parquet(Path(entry["path"]))[0] for entry in entries}
    return {path for path, run in manifests.items() if run.validity is not None and not run.validity.invalid}


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )


def strike(
    words: list[str], out: Path, number: signal.Signals, after_rows: int, after_s: float
) -> tuple[float, set[str]]:
    """Send one signal, so long after so many rows were there.

    Returns:
        The seconds until everything had ended, and the rows that were there before it.
    """
    where = f"{words}, {number.name} {after_s:.2f} s after {after_rows} rows"
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.cli", *words],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    started: set[psutil.Process] = set()
    harness = psutil.Process(process.pid)
    end_s = 0.0
    while process.poll() is None:
        if not end_s and num_lines_below(out) >= after_rows:
            end_s = time.monotonic() + after_s
        if end_s and time.monotonic() > end_s:
            break
        started |= set(harness.children(recursive=True))
        time.sleep(0.1)
    kept = rows_below(out)
    if process.poll() is None:
        started |= set(harness.children(recursive=True))
        process.send_signal(number)
    struck_s = time.monotonic()
    try:
        complaints = process.communicate(timeout=END_S)[1]
        left = psutil.wait_procs(started, timeout=END_S)[1]
        assert not left, f"left by {where}: {left}"
    finally:
        for child in started | {harness}:
            if child.is_running():
                child.kill()
    assert "Traceback" not in complaints, f"{where}: {complaints}"
    assert process.returncode in (0, 1, 130, -number), f"{where}: {process.returncode}, {complaints}"
    return time.monotonic() - struck_s, kept


@pytest.mark.timeout(120 + 60 * NUM_SIGNALS)
def test_nothing_is_left_and_no_row_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"BACKEND": "null", "NULL_STEP_MS": "5", "MAX_BATCH": "4", "CORPUS": str(write_corpus(tmp_path))}
    for name, value in {**given, "REQUESTS": str(NUM_REQUESTS), "WARMUP": "4"}.items():
        monkeypatch.setenv(name, value)
    rng = random.Random(SEED)
    longest_s, num_rows, num_runs, num_recovered = 0.0, 0, 0, 0
    for count in range(NUM_SIGNALS):
        words, number = CASES[count % len(CASES)], SIGNALS[count % len(SIGNALS)]
        out = tmp_path / f"out-{count}"
        words = [*words, "--out", str(out), "--floor", str(count % 2)]
        # A quarter of the moments are before the first row, some are at the end of a run or between two.
        most = NUM_REQUESTS * (2 if words[0] == "compare" else 1)
        after_rows = rng.choice([0, NUM_REQUESTS - 1, rng.randrange(1, most), rng.randrange(1, most)])
        after_s = rng.uniform(0.0, 1.0 if after_rows else 8.0)
        took_s, kept = strike(words, out, number, after_rows, after_s)
        longest_s = max(longest_s, took_s)
        print(f"{words[0]} {number.name}: ended after {took_s:.1f} s, {len(kept)} rows", flush=True)
        for journal in out.rglob("*" + JOURNAL_SUFFIX):
            if len(read_journal(journal).rows):
                assert lab("report", "--recover", str(journal)).returncode in (0, 1)
                num_recovered += 1
            journal.unlink()
        missing = kept - rows_below(out)
        assert not missing, f"{len(missing)} of {len(kept)} rows lost by {number.name}: {words}"
        num_rows += len(kept)
        if words[0] == "compare" and (runs := runs_below(out)):
            num_runs += len(runs)
            resumed = lab(*words, "--resume")
            assert resumed.returncode in (0, 1), resumed.stderr
            assert runs <= runs_below(out)
            (made,) = sorted((out / "compare").glob("*.parquet"))[-1:]
            manifest, _ = read_parquet(made)
            assert isinstance(manifest, ComparisonManifest)
            assert runs <= {str(run.path) for run in manifest.runs}
    print(f"\n{NUM_SIGNALS} signals, all ended after at most {longest_s:.1f} s;")
    print(f"{num_rows} rows and {num_runs} runs were there, none lost; {num_recovered} journals recovered")
