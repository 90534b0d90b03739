"""What a parquet file says about itself: everything needed to repeat the run or to doubt it.

What enters are settings, corpus, schedule and what the server said; what leaves is one JSON object.
Facts of a single replay are appended to `repeats` as it ends. No secret is recorded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.plan.corpus import REPOSITORY, Corpus
from harness.plan.schedule import Schedule
from harness.replay.event_loop import loop_name
from harness.replay.machine import MachineUse, describe_host
from harness.replay.runner import ReplayEnd
from harness.results.record import Manifest
from harness.results.steps import StepSummary
from harness.settings import HarnessSettings
from services.contract.status import ModelCard

SCHEMA_VERSION = 1
_PACKAGES = ("batching-lab", "httptools", "uvloop", "pandas", "pyarrow")


def utc_stamp(now: datetime | None = None) -> str:
    """The time as it stands in file names, to the second."""
    return (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")


def new_run_id(stamp: str) -> str:
    return f"{stamp}-{secrets.token_hex(3)}"


def make_manifest(
    *,
    run_id: str,
    variant: str,
    arm: str,
    settings: HarnessSettings,
    corpus: Corpus,
    schedule: Schedule,
    card: ModelCard | None,
    served_model: str,
    is_local: bool,
    planned_repeats: Sequence[int],
) -> Manifest:
    """The manifest before the first measured request; `repeats` and `validity` are filled in later."""
    load = schedule.load
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "variant": variant,
        "arm": arm,
        "model": served_model,
        "model_digest": card.model_digest if card else None,
        "service": card.model_dump(mode="json") if card else None,
        "is_local": is_local,
        "settings": settings.recorded(),
        "seeds": schedule.seeds,
        "corpus": {
            "path": str(corpus.path),
            "sha256": corpus.sha256,
            "recorded_sha256": corpus.recorded_sha256,
            "num_prompts": len(corpus.prompts),
        },
        "schedule": {
            "digest": schedule.digest,
            "num_requests": len(schedule.requests),
            "arrivals": load.arrivals.value,
            "concurrency": None if load.is_open else load.concurrency,
            "rate": load.rate,
            "shape": load.shape,
            "shard": list(schedule.shard),
            "part_digest": schedule.part_digest,
        },
        "git": git_state(),
        "uv_lock_sha256": _sha256_of(REPOSITORY / "uv.lock"),
        "packages": _package_versions(),
        "event_loop": loop_name(),
        "host": describe_host(),
        "planned_repeats": list(planned_repeats),
        "repeats": [],
        "validity": None,
    }


def describe_repeat(
    repeat: int,
    end: ReplayEnd,
    use: MachineUse,
    steps: StepSummary | None,
    card: ModelCard | None,
    service_problem: str | None,
) -> dict[str, Any]:
    """The entry of one replay in `repeats`. `clock_start_s` is on the clock of the rows' stamps."""
    return {
        "repeat": repeat,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "clock_start_s": end.started_s,
        "wall_s": end.ended_s - end.started_s,
        "hit_in_flight_cap": end.hit_in_flight_cap,
        "was_interrupted": end.was_interrupted,
        "service_problem": service_problem,
        "model_digest": card.model_digest if card else None,
        "machine": asdict(use),
        "steps": steps.as_dict() if steps else None,
    }


def git_state() -> dict[str, Any]:
    sha = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain") if sha else None
    return {"sha": sha, "is_dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=10, check=True
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
