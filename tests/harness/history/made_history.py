"""Histories of made-up nights: the result files that a nightly would leave, or the history's rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from harness.history.entries import SCHEMA
from harness.results.manifest import Validity
from harness.results.record import make_table, write_parquet
from tests.harness.made_rows import made_manifest, made_row

FIRST_NIGHT = datetime(2026, 9, 1, 2, tzinfo=UTC)


def made_night(
    folder: Path,
    night: int,
    step_s: float,
    *,
    arm: str = "continuous",
    num_rows: int = 8,
    backend: str = "null",
    **changes: object,
) -> Path:
    """The file of one night: answers of five tokens, one every `step_s` (a little more with each request)."""
    steps = [step_s * (1 + 0.01 * index) for index in range(num_rows)]
    rows = [
        made_row(
            index, arm=arm, scheduled_s=0.0, sent_s=0.0, chunk_tokens=(1,) * 5,
            chunk_s=tuple(step * (position + 2) for position in range(5)),
        )
        for index, step in enumerate(steps)
    ]  # fmt: skip
    run_id = f"run-{arm}-{night}"
    rows = [{**row, "run_id": run_id} for row in rows]
    manifest = made_manifest(
        rows,
        **{
            "run_id": run_id,
            "arm": arm,
            "variant": arm.split()[0],
            "started_at": (FIRST_NIGHT + timedelta(days=night)).isoformat(),
            "git": {"sha": f"{night:040x}"[::-1], "is_dirty": False},
            "service": {"backend": backend},
            "validity": Validity(),
            **changes,
        },
    )
    path = folder / f"{arm}-{night:03}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, make_table(rows), manifest)
    return path


def made_nights(
    folder: Path,
    num: int,
    *,
    step_at: int | None = None,
    change: float = 0.05,
    noise: float = 0.01,
    seed: int = 0,
) -> Sequence[Path]:
    """`num` nights of noise; from night `step_at` on each step takes `change` longer."""
    spread = np.random.default_rng(seed).normal(size=num) * noise
    return [
        made_night(
            folder,
            night,
            0.01 * float(np.exp(spread[night])) * (1 + change * (step_at is not None and night >= step_at)),
        )
        for night in range(num)
    ]


def sha(night: int) -> str:
    return f"{night:012x}"


def held(night: int, old: str, new: str, ratio: float, **changes: object) -> dict[str, object]:
    """A row of the history: `new` held against `old`."""
    line: dict[str, object] = dict.fromkeys(SCHEMA.names) | {
        "started_at": FIRST_NIGHT + pd.Timedelta(days=night), "entry_id": f"night {night}",
        "kind": "comparison", "strategy": "continuous", "against": f"continuous at {old}",
        "backend": "null", "model": "m", "load": "closed 1 x8",
        "machine": f"machine {night % 3}", "commit": new, "is_old": False, "validity": "VALID",
        "metric": "output_tokens_per_s", "value": ratio, "low": ratio * 0.99, "high": ratio * 1.01,
    }  # fmt: skip
    return line | changes
