"""`lab compare`: several strategies in interleaved blocks, then side by side.

What enters are variants and a number of blocks; what leaves are one parquet file per run, one with all
rows, and the printed comparison. Every block measures every arm once, in an order that rotates from block
to block, one fresh service at a time, so that a machine that drifts drifts for all. Decides no figure.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from adapters.base import ConfigError
from harness.arm_file import Arm, Measurement
from harness.arms import arm_order, find_arms
from harness.arrivals import Schedule
from harness.comparison import render_comparison
from harness.corpus import Corpus
from harness.manifest import utc_stamp
from harness.measure import measure
from harness.progress import Reporter, make_reporter
from harness.record import Manifest, read_parquet, write_table
from harness.run_bench import INTERRUPTED_STATUS, add_corpus_option, plan
from harness.settings import HarnessSettings, add_setting_options, read_settings
from harness.validity import Verdict

DEFAULT_VARIANTS = ("baseline", "static", "dynamic", "continuous")
DEFAULT_BLOCKS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # One variant, repeats and a running server are what `bench` is for.
    add_setting_options(parser, leave_out=frozenset({"variant", "repeats", "url"}))
    add_corpus_option(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(DEFAULT_VARIANTS),
        metavar="NAME",
        help=f"strategies to compare (default: {' '.join(DEFAULT_VARIANTS)})",
    )
    parser.add_argument(
        "--blocks", type=int, default=DEFAULT_BLOCKS, metavar="N", help=f"default {DEFAULT_BLOCKS}"
    )
    parser.add_argument(
        "--pad",
        choices=("on", "off", "both"),
        default="both",
        help="PAD_FINISHED of the strategies that keep finished rows (default both)",
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="arm that ratios refer to (default baseline, else the first)"
    )


def run(args: argparse.Namespace) -> int:
    """Compare, print, and return the exit status.

    Raises:
        LabError: nothing could be measured; the message says why.
    """
    if args.blocks < 1:
        raise ConfigError(f"--blocks must be at least 1, not {args.blocks}")
    settings = read_settings(args).model_copy(update={"variant": None, "url": None, "repeats": 1})
    names = [name for word in args.variants for name in word.replace(",", " ").split()]
    corpus, schedule = plan(settings, allow_changed_corpus=args.allow_changed_corpus)
    with make_reporter() as reporter:
        arms = find_arms(names, args.pad, settings, reporter)
        reference = _reference(arms, args.baseline)
        measurements = _measure_blocks(arms, args.blocks, settings, corpus, schedule, reporter)
    manifest = _manifest(measurements, arms, reference, args.blocks)
    path = _write_all(settings.out / "compare", measurements, manifest)
    print(render_comparison(read_parquet(path)[1], manifest))
    print(f"rows: {path}")
    if any(measurement.was_interrupted for measurement in measurements):
        return INTERRUPTED_STATUS
    return 1 if manifest["validity"]["level"] == "INVALID" else 0


def _measure_blocks(
    arms: Sequence[Arm],
    num_blocks: int,
    settings: HarnessSettings,
    corpus: Corpus,
    schedule: Schedule,
    reporter: Reporter,
) -> list[Measurement]:
    measurements: list[Measurement] = []
    for block in range(num_blocks):
        for arm in arm_order(arms, block, num_blocks, settings.seed):
            reporter.announce(f"block {block + 1} of {num_blocks}: {arm.name}")
            try:
                measurements.append(measure(arm, settings, corpus, schedule, reporter, [block]))
            except KeyboardInterrupt:
                if not measurements:
                    raise
                return measurements
            if measurements[-1].was_interrupted:
                return measurements
    return measurements


def _reference(arms: Sequence[Arm], asked: str | None) -> str:
    """The arm that ratios refer to.

    Raises:
        ConfigError: the one asked for is not measured.
    """
    names = [str(arm.name) for arm in arms]
    if asked is None:
        return "baseline" if "baseline" in names else names[0]
    if asked not in names:
        raise ConfigError(f"--baseline {asked} is not among the arms: {', '.join(names)}")
    return asked


def _manifest(
    measurements: Sequence[Measurement], arms: Sequence[Arm], reference: str, num_blocks: int
) -> Manifest:
    measured = {str(m.manifest["arm"]) for m in measurements}
    return {
        "kind": "comparison",
        "schema_version": measurements[0].manifest["schema_version"],
        "started_at": measurements[0].manifest["started_at"],
        "arms": [arm.name for arm in arms if arm.name in measured],
        "reference": reference,
        "num_blocks": num_blocks,
        "runs": [{**m.manifest, "path": str(m.path)} for m in measurements],
        "validity": _verdict(measurements, len(arms) * num_blocks).as_dict(),
    }


def _verdict(measurements: Sequence[Measurement], num_planned: int) -> Verdict:
    """The worst of all runs, each reason once with the arms it holds for, and what only all show."""
    invalid: list[str] = []
    if len(measurements) < num_planned:
        invalid.append(f"{len(measurements)} of {num_planned} runs were made")
    manifests = [m.manifest for m in measurements]
    for name, values in (
        ("schedules", {m["schedule"]["digest"] for m in manifests}),
        ("corpora", {m["corpus"]["sha256"] for m in manifests}),
        ("models", {m["model_digest"] for m in manifests}),
        ("kinds of scheduling", {m["service"]["scheduling"] for m in manifests}),
    ):
        if len(values) > 1:
            invalid.append(f"the runs had different {name}: they cannot be compared")
    return Verdict(
        (*invalid, *merged_reasons([(m.manifest["arm"], m.verdict.invalid) for m in measurements])),
        merged_reasons([(m.manifest["arm"], m.verdict.caution) for m in measurements]),
    )


def merged_reasons(reasons: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, ...]:
    """Reasons that differ in their figures only are told once, in the words of the first."""
    arms_of: dict[str, list[str]] = {}
    first_words: dict[str, str] = {}
    for arm, sentences in reasons:
        for sentence in sentences:
            kind = re.sub(r"[0-9.,]+", "#", sentence)
            first_words.setdefault(kind, sentence)
            named = arms_of.setdefault(kind, [])
            if arm not in named:
                named.append(arm)
    num_arms = len({arm for arm, _ in reasons})
    told: list[str] = []
    for kind, sentence in first_words.items():
        who = "all arms" if len(arms_of[kind]) == num_arms > 1 else ", ".join(arms_of[kind])
        told.append(f"{who}: {sentence}")
    return tuple(told)


def _write_all(folder: Path, measurements: Sequence[Measurement], manifest: Manifest) -> Path:
    """One file with the rows of all runs, as they stand in the files of these runs."""
    tables = [pq.read_table(m.path).replace_schema_metadata(None) for m in measurements]
    stem, number = utc_stamp(), 1
    while (path := folder / (f"{stem}.parquet" if number == 1 else f"{stem}-{number}.parquet")).exists():
        number += 1
    write_table(path, pa.concat_tables(tables), manifest)
    return path
