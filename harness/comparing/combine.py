"""Runs put side by side: one frame of rows and one manifest that holds a manifest for each run.

Runs come from measurements or from result files of other settings, backends, models or commits. Those whose
figures cannot be compared are refused or marked; the whole is as valid as the worst of its runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa

from adapters.base import ConfigError
from adapters.text.unicode_text import printable
from harness.replay.arm_file import Measurement
from harness.results.formulas import MIN_TTFT_FALL, ttft_fall
from harness.results.manifest import ComparisonManifest, RunManifest, Validity
from harness.results.output_dir import free_path, utc_stamp
from harness.results.record import read_parquet, read_table, write_parquet

Fact = Callable[[RunManifest], Hashable]

_MUST_AGREE: tuple[tuple[str, Fact], ...] = (
    ("corpora", lambda m: m.corpus.sha256),
    ("kinds (measured, simulated)", lambda m: m.kind),
)
_SHOULD_AGREE: tuple[tuple[str, Fact], ...] = (
    ("models", lambda m: m.model_digest),
    ("kinds of scheduling (lab, engine)", lambda m: m.service and m.service.scheduling),
    ("machines", lambda m: (m.host.cpu_model, m.host.physical_cores)),
)


class ResultFile(NamedTuple):
    path: Path
    manifest: RunManifest | ComparisonManifest
    rows: pd.DataFrame


@dataclass(frozen=True, slots=True)
class Comparison:
    rows: pd.DataFrame
    manifest: ComparisonManifest


def comparison_manifest(
    runs: Sequence[RunManifest], arms: Sequence[str], reference: str, num_blocks: int, validity: Validity
) -> ComparisonManifest:
    return ComparisonManifest(
        kind="comparison",
        schema_version=runs[0].schema_version,
        started_at=runs[0].started_at,
        arms=list(arms),
        reference=reference,
        num_blocks=num_blocks,
        runs=list(runs),
        validity=validity,
    )


def unranked_text(runs: Sequence[RunManifest]) -> str | None:
    """Why no arm of these runs may be called the best; None where one may."""
    kinds: dict[str, list[str]] = {}
    for run in runs:
        if run.service and run.arm not in kinds.setdefault(run.service.scheduling, []):
            kinds[run.service.scheduling].append(run.arm)
    if len(kinds) < 2:
        return None
    told = "; ".join(f"{kind}: {', '.join(arms)}" for kind, arms in kinds.items())
    return (
        f"Nothing is ranked: the arms are of two kinds of scheduling ({told}). A ratio between the kinds "
        "says what it costs to let the lab decide each step, not which strategy is better."
    )


def choose_reference(names: Sequence[str], asked: str | None) -> str:
    """The arm that ratios refer to, named as tables name it or as `--variants` does.

    Raises:
        ConfigError: the one asked for is not there.
    """
    if asked is None:
        return "baseline" if "baseline" in names else names[0]
    if asked not in names:
        as_shown = re.sub("[@,]", " ", asked)
        if as_shown in names:
            return as_shown
        raise ConfigError(f"--baseline {asked} is not among the arms: {', '.join(names)}")
    return asked


def validity_of(runs: Sequence[RunManifest], num_planned: int, *, one_schedule: bool = True) -> Validity:
    """The worst of all runs, each reason once with the arms it holds for, and what only all show.

    `one_schedule`: they are compared, so that the runs of a block must have replayed the same requests.
    """
    invalid: list[str] = []
    if len(runs) < num_planned:
        invalid.append(f"{len(runs)} of {num_planned} runs were made")
    schedules = ["schedules"] if one_schedule and schedules_differ(runs) else []
    differing = [*schedules, *_differing(_MUST_AGREE, runs)]
    invalid += [f"the runs had different {name}: they cannot be compared" for name in differing]
    caution = [f"the runs had different {name}" for name in _differing(_SHOULD_AGREE, runs)]
    told = [(m.arm, m.validity) for m in runs if m.validity]
    return Validity(
        (*invalid, *merged_reasons([(arm, v.invalid) for arm, v in told])),
        (*caution, *merged_reasons([(arm, v.caution) for arm, v in told])),
    )


def schedules_differ(runs: Sequence[RunManifest]) -> bool:
    """Whether the runs of any one block replayed different requests. Blocks may differ from each other."""
    planned: dict[int, str] = {}
    return any(
        planned.setdefault(repeat, run.schedule.plan_digest) != run.schedule.plan_digest
        for run in runs
        for repeat in run.planned_repeats
    )


def draws_text(runs: Sequence[RunManifest]) -> str:
    """What the intervals of several blocks speak about."""
    if len({run.schedule.plan_digest for run in runs}) > 1:
        return (
            "Each block drew new prompts and arrivals, the same for all its arms: the intervals hold for "
            "traffic like this."
        )
    return "All blocks replayed one list of requests: the intervals hold for this list alone."


def _differing(facts: Sequence[tuple[str, Fact]], runs: Sequence[RunManifest]) -> list[str]:
    return [name for name, of in facts if len({of(run) for run in runs}) > 1]


_FIGURE = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def merged_reasons(reasons: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, ...]:
    """Reasons that differ in their figures only are told once, each figure from its lowest to its highest."""
    told: dict[str, tuple[list[str], list[str]]] = {}
    for arm, sentences in reasons:
        for sentence in sentences:
            arms, words = told.setdefault(_FIGURE.sub("#", sentence), ([], []))
            arms.append(arm)
            words.append(sentence)
    num_arms = len({arm for arm, _ in reasons})
    return tuple(
        f"{'all arms' if len(set(arms)) == num_arms > 1 else ', '.join(dict.fromkeys(arms))}: "
        f"{_with_ranges(words)}"
        for arms, words in told.values()
    )


def _with_ranges(sentences: Sequence[str]) -> str:
    """Of sentences that differ in their figures only, as: other processes took 11 to 92% of the time."""
    figures = iter(zip(*map(_FIGURE.findall, sentences), strict=True))

    def told(_: re.Match[str]) -> str:
        values = sorted(set(next(figures)), key=lambda text: float(text.replace(",", "")))
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return _FIGURE.sub(told, sentences[0])


def write_comparison(
    folder: Path, measurements: Sequence[Measurement], arms: Sequence[str], reference: str, num_blocks: int
) -> tuple[Path, ComparisonManifest]:
    """One file with the rows of all runs, as they stand in the files of these runs.

    Fewer runs than one of each of `arms` in each block make it INVALID.
    """
    for measurement in measurements:
        measurement.manifest.path = str(measurement.path)
    runs = [measurement.manifest for measurement in measurements]
    measured = [arm for arm in arms if arm in {run.arm for run in runs}]
    validity = validity_of(runs, len(arms) * num_blocks)
    manifest = comparison_manifest(runs, measured, reference, num_blocks, validity)
    path = free_path(folder, utc_stamp())
    write_parquet(path, pa.concat_tables([read_table(m.path) for m in measurements]), manifest)
    return path, manifest


def read_result(path: Path) -> ResultFile:
    """
    Raises:
        LabError: the file cannot be read.
    """
    return ResultFile(path, *read_parquet(path))


def join_runs(files: Sequence[ResultFile]) -> tuple[list[RunManifest], pd.DataFrame]:
    """All runs of these files, and their rows. Arms of one name and load are told apart by commit or file."""
    runs: list[RunManifest] = []
    frames: list[pd.DataFrame] = []
    taken: set[tuple[str, str]] = set()
    for path, manifest, rows in files:
        own_runs = manifest.runs if isinstance(manifest, ComparisonManifest) else [manifest]
        digest = own_runs[0].schedule.plan_digest
        names = {
            arm: _free_name(arm, path, own_runs[0], {name for name, load in taken if load == digest})
            for arm in dict.fromkeys(m.arm for m in own_runs)
        }
        taken |= {(name, digest) for name in names.values()}
        frames.append(rows.assign(arm=rows["arm"].map(names)))
        for m in own_runs:
            m.own_arm, m.arm = m.arm, names[m.arm]
            m.file = str(path)
            m.path = m.path or str(path)
        runs += own_runs
    return runs, pd.concat(frames, ignore_index=True)


def compare_files(
    paths: Sequence[Path], *, asked_reference: str | None = None, allow_invalid: bool = False
) -> Comparison:
    """Several result files as one comparison; blocks are paired by number of repeat.

    Raises:
        ConfigError: a file is INVALID and `allow_invalid` is not set, or there is nothing to compare.
        LabError: a file cannot be read.
    """
    files = [read_result(path) for path in paths]
    for file in files:
        told = file.manifest.validity or Validity(("unfinished",))
        if told.invalid and not allow_invalid:
            why = printable(told.invalid[0])
            raise ConfigError(f"{file.path} is INVALID ({why}); --allow-invalid takes it anyway")
    runs, rows = join_runs(files)
    arms = list(dict.fromkeys(m.arm for m in runs))
    if len(arms) < 2:
        if len(paths) > 1:
            raise ConfigError(f"all files hold the one arm {arms[0]}, as runs of other loads or repeats do")
        raise ConfigError("name at least two result files, or a comparison of two arms")
    validity = validity_of(runs, len(runs))
    if len(paths) > 1:
        note = "the files were not measured in turns: what the machine did in between is in the ratios"
        validity = Validity(validity.invalid, (note, *cache_doubts(runs, rows), *validity.caution))
    num_blocks = int(rows["repeat"].nunique())
    reference = choose_reference(arms, asked_reference)
    return Comparison(rows, comparison_manifest(runs, arms, reference, num_blocks, validity))


def cache_doubts(runs: Sequence[RunManifest], rows: pd.DataFrame) -> list[str]:
    """Runs that sent a foreign server the very prompts that it had got in another one."""
    known: dict[Hashable, list[RunManifest]] = {}
    for run in runs:
        if run.service is None and run.settings.url:
            known.setdefault((run.settings.url, run.schedule.digest), []).append(run)
    doubts: list[str] = []
    for same in known.values():
        same.sort(key=lambda run: run.started_at)
        parts = [rows[rows["arm"] == run.arm] for run in same]
        for run, before, after in zip(same[1:], parts, parts[1:], strict=False):
            fell = ttft_fall(before, after)
            told = f": TTFT fell {fell:.1f}-fold" if fell >= MIN_TTFT_FALL else ""
            doubts.append(
                f"{run.arm}: its server had got the same prompts in a run before, without a new salt (SALT): "
                f"a prefix cache would show{told}"
            )
    return doubts


def _free_name(arm: str, path: Path, run: RunManifest, taken: set[str]) -> str:
    """The arm's own name, else with the commit, else with the file it stands in; one that can be drawn."""
    sha = (run.git.sha or "")[:8]
    names = (arm, f"{arm} {sha}" if sha else arm, f"{arm} {path.stem}", f"{arm} {path}")
    free = (name for name in map(printable, names) if name not in taken)
    return next(free, printable(f"{arm} {len(taken)}"))
