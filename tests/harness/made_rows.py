"""Rows and manifests written by hand, for tests of what is computed from them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.client.answer import Answer
from harness.plan.schedule import Arrivals, Load, PlannedRequest, schedule_digest
from harness.results.manifest import RepeatEntry, RunManifest
from harness.results.record import ReplayLabels, Row, make_row, make_table, to_frame


def made_row(
    index: int = 0,
    *,
    scheduled_s: float = 0.0,
    sent_s: float | None = 0.0,
    chunk_s: tuple[float, ...] = (1.0, 2.0),
    chunk_tokens: tuple[int, ...] | None = (1, 1),
    num_output_tokens: int | None = None,
    error: str | None = None,
    repeat: int = 0,
    arm: str = "continuous",
    offset_s: float | None = None,
    token_ids: list[int] | None = None,
    group_id: int | None = None,
    max_tokens: int | None = None,
) -> Row:
    """A row as the client would leave it, with tokens that say nothing unless given."""
    num = sum(chunk_tokens) if chunk_tokens else num_output_tokens
    planned = PlannedRequest(index, f"p{index}", "text", max_tokens or num or 1, index, offset_s)
    answer = Answer(planned, scheduled_s, group_id=index if group_id is None else group_id, sent_s=sent_s)
    answer.chunk_s = list(chunk_s)
    answer.chunk_tokens = list(chunk_tokens or ())
    answer.has_token_ids = chunk_tokens is not None
    answer.token_ids = token_ids if token_ids is not None else list(range(num or 0))
    answer.text = ["x"]
    answer.num_output_tokens = num_output_tokens if num_output_tokens is not None else num
    answer.num_prompt_tokens = 5
    answer.finish_s = chunk_s[-1] if chunk_s else scheduled_s
    answer.finish_reason = None if error else "length"
    answer.error = error
    return make_row(ReplayLabels("run", arm.split()[0], arm, "null", "m", repeat), answer)


def made_frame(rows: list[Row]) -> pd.DataFrame:
    return to_frame(make_table(rows))


def made_manifest(
    rows: list[Row],
    *,
    load: Load | None = None,
    repeats: int = 1,
    entries: list[RepeatEntry] | None = None,
    **changes: Any,
) -> RunManifest:
    """The manifest of a quiet run that planned exactly these rows. `entries` are its repeats."""
    load = load or Load(Arrivals.CLOSED, concurrency=1)
    own = min((row["repeat"] for row in rows), default=0)
    first = [row for row in rows if row["repeat"] == own]
    planned = [
        (r["schedule_index"], r["prompt_id"], r["max_tokens"], r["seed"], r["offset_s"])
        for r in sorted(first, key=lambda r: r["schedule_index"])
    ]
    manifest = {
        "schema_version": 1,
        "run_id": "run",
        "arm": "continuous",
        "variant": "continuous",
        "model": "m",
        "model_digest": "d",
        "started_at": "2026-01-01T00:00:00+00:00",
        "is_local": True,
        "service": {
            "num_threads": 1, "scheduling": "lab", "backend": "null", "device": "none", "dtype": "none",
            "strategy": {"max_batch": 4},
        },
        "settings": {"url": None, "seed": 0},
        "corpus": {"path": "p", "sha256": "c" * 64, "recorded_sha256": "c" * 64, "num_prompts": 500},
        "schedule": {
            "digest": schedule_digest(load, planned),
            "num_requests": len(first),
            "arrivals": load.arrivals.value,
            "concurrency": None if load.is_open else load.concurrency,
            "rate": load.rate,
        },
        "host": {"cpu_model": "a CPU", "cpu_governor": None, "physical_cores": 2},
        "planned_repeats": list(range(own, own + repeats)),
        "repeats": [made_repeat(repeat) for repeat in range(repeats)] if entries is None else entries,
        "validity": None,
    }  # fmt: skip
    return RunManifest.model_validate(_changed(manifest, changes))


def made_repeat(repeat: int = 0, **changes: Any) -> RepeatEntry:
    entry = {
        "repeat": repeat,
        "ended_at": "2026-01-01T00:01:00+00:00",
        "clock_start_s": 0.0,
        "wall_s": 60.0,
        "hit_in_flight_cap": False,
        "was_interrupted": False,
        "service_problem": None,
        "model_digest": "d",
        "machine": {"steal_share": 0.0, "other_cpu_share": 0.0, "harness_cpu_share": 0.1},
        "steps": {
            "num_steps": 9, "mean_batch_size": 2.0, "dead_row_share": 0.25, "median_step_ms": 1.0,
            "busy_s": 1.0, "num_dropped": 0,
        },
    }  # fmt: skip
    return RepeatEntry.model_validate(_changed(entry, changes))


def _changed(facts: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Objects take over the keys that a change does not name."""
    merged = {
        name: facts[name] | value
        for name, value in changes.items()
        if isinstance(value, dict) and isinstance(facts.get(name), dict)
    }
    return facts | changes | merged
