"""`lab merge`: the files of all shards of one run become the file of the run.

The whole is judged anew: the digest over all rows has to be that of the schedule without shards. Instants
count from the start that all shards shared, since each machine has a clock of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from adapters.base import ConfigError
from harness.commands.options import without_steps
from harness.commands.report import render_report
from harness.results.manifest import RunManifest
from harness.results.output_dir import make_folder
from harness.results.record import SCHEMA, read_parquet, write_parquet
from harness.results.validity import judge
from services.contract.timings import INSTANTS

_INSTANTS = ("scheduled_s", "sent_s", "written_s", "finish_s", *INSTANTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="one file for each shard")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the parquet file to write")


def run(args: argparse.Namespace) -> int:
    """Merge, judge, print.

    Raises:
        LabError: the files are not all the shards of one run.
    """
    make_folder(args.out.parent)
    manifest, rows = merge(args.files)
    validity = manifest.validity = judge(rows, manifest)
    table = pa.Table.from_pandas(rows, schema=SCHEMA, preserve_index=False)
    write_parquet(args.out, table, manifest)
    print(render_report(rows, manifest, validity, args.out))
    return 1 if validity.level == "INVALID" else 0


def merge(paths: Sequence[Path]) -> tuple[RunManifest, pd.DataFrame]:
    """All rows in the order of the schedule, and the manifest of the whole.

    Raises:
        ConfigError: a shard is missing or twice there, or the files are of different runs.
        LabError: a file cannot be read.
    """
    shards: dict[int, tuple[RunManifest, pd.DataFrame]] = {}
    for path in without_steps(paths):
        manifest, rows = read_parquet(path)
        if not isinstance(manifest, RunManifest):
            raise ConfigError(f"{path} is a comparison, not the shard of a run")
        if not manifest.repeats or not set(rows["repeat"]) <= {entry.repeat for entry in manifest.repeats}:
            raise ConfigError(f"{path} is of a run that did not reach its end: measure this shard anew")
        index, of = manifest.schedule.shard
        if index in shards:
            raise ConfigError(f"{path}: shard {index}/{of} is there twice")
        shards[index] = manifest, rows
    manifests = [shards[index][0] for index in sorted(shards)]
    of = manifests[0].schedule.shard[1]
    for name, values in (
        ("schedules", {m.schedule.digest for m in manifests}),
        ("numbers of shards", {m.schedule.shard[1] for m in manifests}),
        ("models", {m.model_digest for m in manifests}),
        ("starts", {m.settings.start_at for m in manifests}),
    ):
        if len(values) > 1:
            raise ConfigError(f"these are not the shards of one run: they have different {name}")
    missing = sorted(set(range(of)) - set(shards))
    if missing:
        raise ConfigError(f"shards are missing: {', '.join(f'{index}/{of}' for index in missing)}")
    run_id = manifests[0].run_id
    # Requests went out in groups within each shard; numbers of groups must not meet.
    frames = [_from_start(*shards[index], run_id, index, of) for index in sorted(shards)]
    rows = pd.concat(frames, ignore_index=True).sort_values(["repeat", "schedule_index"], ignore_index=True)
    return _whole_manifest(manifests), rows


def _from_start(manifest: RunManifest, rows: pd.DataFrame, run_id: str, index: int, of: int) -> pd.DataFrame:
    starts = {entry.repeat: entry.clock_start_s for entry in manifest.repeats}
    start_s = rows["repeat"].map(starts)
    moved = rows.assign(run_id=run_id, group_id=rows["group_id"] * of + index)
    for name in _INSTANTS:
        moved[name] = rows[name] - start_s
    moved["chunk_s"] = [stamps - first for stamps, first in zip(rows["chunk_s"], start_s, strict=True)]
    return moved


def _whole_manifest(manifests: Sequence[RunManifest]) -> RunManifest:
    whole = manifests[0].model_copy(deep=True)
    plan, entry = whole.schedule, whole.repeats[0]
    plan.num_requests = sum(m.schedule.num_requests for m in manifests)
    plan.shard, plan.part_digest = (0, 1), plan.digest
    entries = [e for m in manifests for e in m.repeats]
    entry.clock_start_s = 0.0
    entry.wall_s = max(e.wall_s for e in entries)
    entry.hit_in_flight_cap = any(e.hit_in_flight_cap for e in entries)
    entry.was_interrupted = any(e.was_interrupted for e in entries)
    entry.steps = next((e.steps for e in entries if e.steps), None)
    whole.repeats = [entry]
    whole.merged_from = [m.run_id for m in manifests]
    return whole
