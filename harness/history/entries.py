"""What one result file gives to the history: a line for each arm and figure, and for each ratio of two arms.

Commit and day are those of the run, not of the moment at which it is added. An INVALID run is kept and
marked: a night that failed is part of the history.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from harness.comparing.combine import read_result
from harness.comparing.contrasts import contrasts, design_of
from harness.history.intervals import figure_interval
from harness.results.manifest import ComparisonManifest, Manifest, RunManifest, Validity
from harness.results.metrics import METRICS, Figure, compared_figures

COMMIT_CHARS = 12
NO_COMMIT = "unknown"

SCHEMA = pa.schema(
    [
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("entry_id", pa.string()),
        ("kind", pa.string()),  # result, or comparison (then value, low and high are ratios to `against`)
        ("strategy", pa.string()),
        ("against", pa.string()),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("load", pa.string()),
        ("machine", pa.string()),
        ("commit", pa.string()),
        ("is_dirty", pa.bool_()),
        ("is_old", pa.bool_()),  # measured beside a newer commit, to hold that one against it
        ("validity", pa.string()),
        ("reason", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("interval_source", pa.string()),
        ("num_requests", pa.int64()),
        ("num_blocks", pa.int64()),
        ("run_ids", pa.list_(pa.string())),
        ("file", pa.string()),
    ]
)


def entries_of(path: Path) -> pa.Table:
    """
    Raises:
        LabError: the file cannot be read, or is no result.
    """
    _, manifest, rows = read_result(path)
    runs = _runs(manifest)
    arms = list(dict.fromkeys(run.arm for run in runs))
    lines = [line for arm in arms for line in _results(arm, manifest, rows)]
    if isinstance(manifest, ComparisonManifest):
        lines += _ratios(manifest, rows)
    # The same runs give the same entry, whatever their file is called; more of their requests or another
    # judgement of them gives another one.
    facts = {f"{run.run_id} {run.arm} {run.validity and run.validity.level}" for run in runs}
    told = "\n".join([*sorted(facts), f"{len(lines)} {len(rows)} {rows['error'].notna().sum()}"])
    entry_id = hashlib.sha256(told.encode()).hexdigest()[:16]
    common = {"entry_id": entry_id, "file": path.name}
    return pa.Table.from_pylist([{**line, **common} for line in lines], schema=SCHEMA)


def _results(arm: str, manifest: Manifest, rows: pd.DataFrame) -> Iterator[dict[str, object]]:
    own = [run for run in _runs(manifest) if run.arm == arm]
    mine = rows[rows["arm"] == arm]
    facts = _facts(own, mine)
    is_open = own[0].schedule.load.is_open
    figures = dict.fromkeys([Figure(m, q) for m in METRICS for q in (50, 95, 99) if m.samples])
    figures |= dict.fromkeys(Figure(m) for m in METRICS if m.of_run)
    for figure in figures:
        value = figure.over(mine, is_open) if len(mine) else None
        if value is None:
            continue
        found = figure_interval(figure, mine, value, is_open=is_open)
        yield {
            **facts,
            "kind": "result",
            "metric": figure.key,
            "value": value,
            "low": found and found.low,
            "high": found and found.high,
            "interval_source": found and found.source,
        }
    # A night without an answer still has its place, and its validity.
    yield {
        **facts,
        "kind": "result",
        "metric": "failed_requests",
        "value": float(mine["error"].notna().sum()),
    }


def _ratios(manifest: ComparisonManifest, rows: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Each strategy against its own older commit where one was measured too, else against the reference."""
    names = {run.arm: _without_commit(run) for run in manifest.runs}
    old_arms = {strategy: arm for arm, (strategy, is_old) in names.items() if is_old}
    for arm in manifest.arms:
        strategy, is_old = names.get(arm, (arm, True))
        reference = old_arms.get(strategy, manifest.reference)
        if is_old or reference not in names or reference == arm:
            continue
        own = [run for run in manifest.runs if run.arm == arm]
        facts = _facts(own, rows[rows["arm"] == arm])
        found = contrasts(
            rows,
            [reference, arm],
            reference,
            is_open=own[0].schedule.load.is_open,
            figures=compared_figures(),
            design=design_of(manifest.runs),
        )
        for contrast in found:
            if (verdict := contrast.verdict) is None:
                continue
            low, high = verdict.interval or (None, None)
            yield {
                **facts,
                "kind": "comparison",
                "against": reference,
                "metric": contrast.figure.key,
                "value": verdict.ratio,
                "low": low,
                "high": high,
                "interval_source": "blocks",
                "validity": manifest.validity.level,
                "reason": _first_reason(manifest.validity),
                "num_blocks": verdict.num_blocks,
            }


def _runs(manifest: Manifest) -> list[RunManifest]:
    return manifest.runs if isinstance(manifest, ComparisonManifest) else [manifest]


def _without_commit(run: RunManifest) -> tuple[str, bool]:
    """The strategy of an arm, and whether it is an older commit's: `lab gate` calls those `NAME at SHA`."""
    name, at, sha = run.arm.rpartition(" at ")
    is_old = bool(at) and bool(sha) and (run.git.sha or "").startswith(sha)
    return (name, True) if is_old else (run.arm, False)


def _facts(runs: Sequence[RunManifest], rows: pd.DataFrame) -> dict[str, object]:
    first = runs[0]
    strategy, is_old = _without_commit(first)
    judged = [run.validity or Validity(("unfinished",)) for run in runs]
    worst = max(judged, key=lambda validity: ("VALID", "CAUTION", "INVALID").index(validity.level))
    return {
        "started_at": pd.Timestamp(first.started_at).tz_convert("UTC").to_pydatetime(),
        "strategy": strategy,
        "is_old": is_old,
        "backend": first.service.backend if first.service else "external",
        "model": first.model,
        "load": load_text(first),
        "machine": f"{first.host.cpu_model}, {first.host.physical_cores} cores",
        "commit": _commit_of(first),
        "is_dirty": first.git.is_dirty,
        "validity": worst.level,
        "reason": _first_reason(worst),
        "num_requests": len(rows),
        "num_blocks": int(rows.groupby(["run_id", "repeat"]).ngroups) if len(rows) else 0,
        "run_ids": [run.run_id for run in runs],
    }


def _commit_of(run: RunManifest) -> str:
    """A file may claim any name; this one becomes a folder's."""
    is_name = re.fullmatch("[0-9a-f]{7,64}", run.git.sha or "")
    return is_name[0][:COMMIT_CHARS] if is_name else NO_COMMIT


def load_text(run: RunManifest) -> str:
    """As `closed 16` or `poisson 4/s`; equal for equal loads."""
    plan = run.schedule
    if plan.load.is_open:
        return f"{plan.arrivals} {plan.rate:g}/s x{plan.num_requests}"
    return f"closed {plan.concurrency} x{plan.num_requests}"


def _first_reason(validity: Validity) -> str:
    return next(iter((*validity.invalid, *validity.caution)), "")
