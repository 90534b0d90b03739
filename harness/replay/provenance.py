"""Collects what a manifest says: the code, the packages and the machine of a run.

A fact that cannot be found out (no git, no lock file) is None; nothing here makes a run fail.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import secrets
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from harness.plan.corpus import REPOSITORY, Corpus
from harness.plan.schedule import Schedule
from harness.replay.event_loop import loop_name
from harness.replay.machine import describe_host
from harness.replay.replay import ReplayResult
from harness.results.facts import ForeignFacts
from harness.results.manifest import (
    SCHEMA_VERSION,
    CorpusFacts,
    GitFacts,
    RepeatEntry,
    RunManifest,
    ScheduleFacts,
    ServiceFacts,
    SettingsFacts,
)
from harness.results.steps import summarise_steps
from harness.settings import HarnessSettings
from services.contract.status import ModelCard

_PACKAGES = ("batching-lab", "httptools", "uvloop", "pandas", "pyarrow")


def new_run_id(stamp: str) -> str:
    return f"{stamp}-{secrets.token_hex(3)}"


def make_manifest(
    *,
    run_id: str,
    variant: str,
    arm: str,
    source: Path = REPOSITORY,
    settings: HarnessSettings,
    corpus: Corpus,
    schedule: Schedule,
    card: ModelCard | None,
    served_model: str,
    is_local: bool,
    planned_repeats: Sequence[int],
    foreign: ForeignFacts | None = None,
) -> RunManifest:
    """The manifest before the first measured request. `source` is the tree whose code serves."""
    load = schedule.load
    manifest = RunManifest(
        schema_version=SCHEMA_VERSION,
        run_id=run_id,
        started_at=_now(),
        variant=variant,
        arm=arm,
        model=served_model,
        model_digest=card.model_digest if card else None,
        service=ServiceFacts.model_validate(card.model_dump(mode="json")) if card else None,
        is_local=is_local,
        settings=SettingsFacts.model_validate(settings.recorded()),
        seeds=schedule.seeds,
        corpus=CorpusFacts(
            path=str(corpus.path),
            sha256=corpus.sha256,
            recorded_sha256=corpus.recorded_sha256,
            num_prompts=len(corpus.prompts),
            left_out=corpus.left_out,
        ),
        schedule=ScheduleFacts(
            digest=schedule.digest,
            num_requests=len(schedule.requests),
            arrivals=load.arrivals.value,
            concurrency=None if load.is_open else load.concurrency,
            rate=load.rate,
            shape=load.shape,
            shard=schedule.shard,
            part_digest=schedule.part_digest,
            salt=schedule.salt,
            unsalted_digest=schedule.unsalted_digest,
            draw=schedule.draw,
            num_blocks=schedule.num_blocks,
        ),
        git=git_state(source),
        uv_lock_sha256=_sha256_of(source / "uv.lock"),
        packages=_package_versions(),
        event_loop=loop_name(),
        host=describe_host(),
        planned_repeats=list(planned_repeats),
        repeats=[],
        validity=None,
    )
    if foreign is not None:
        manifest.foreign = foreign  # a key that was not given is not written
    return manifest


def describe_repeat(
    repeat: int,
    result: ReplayResult,
    card: ModelCard | None,
    service_problem: str | None,
    num_output_tokens: int,
) -> RepeatEntry:
    """The entry of one replay, made when it has ended."""
    joules = result.use.gpu_joules
    end = result.end
    return RepeatEntry(
        repeat=repeat,
        ended_at=_now(),
        clock_start_s=end.started_s,
        wall_s=end.ended_s - end.started_s,
        hit_in_flight_cap=end.hit_in_flight_cap,
        was_interrupted=end.was_interrupted,
        service_problem=service_problem,
        model_digest=card.model_digest if card else None,
        machine=result.use,
        steps=summarise_steps(result.steps, result.num_dropped_steps),
        round_trip_s=result.round_trip_s,
        server=result.gauges,
        joules_per_token=joules / num_output_tokens if joules is not None and num_output_tokens else None,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state(tree: Path = REPOSITORY) -> GitFacts:
    """Of the repository whose own files these are: an installed wheel may lie inside somebody else's."""
    sha = _git(tree, "rev-parse", "HEAD") if (tree / ".git").exists() else None
    status = _git(tree, "status", "--porcelain") if sha else None
    return GitFacts(sha=sha, is_dirty=None if status is None else bool(status))


def _git(tree: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(tree), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _sha256_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _package_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
