"""A calibration from a measured run: the step log gives the cost, log and rows the time around steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adapters.base import BackendInfo, ConfigError
from adapters.registry import BACKENDS
from harness.plan.corpus import default_path, load_corpus
from harness.results.manifest import RunManifest
from harness.results.record import read_parquet
from harness.results.steps import STEPS_SUFFIX, read_steps
from harness.simulator.calibration import Calibration
from harness.simulator.costs import IDLE_S
from harness.simulator.fitting import Floats, fit_cost, line
from harness.simulator.overheads import Overheads
from services.read_settings import read_settings
from services.settings import Settings

MAX_OTHER_CPU_SHARE = 0.05
_NO_GAP_S = 1e-6


def read_run(path: Path) -> tuple[RunManifest, pd.DataFrame, pd.DataFrame]:
    """Manifest, rows that succeeded and steps.

    Raises:
        ConfigError: as `read_whole_run`.
    """
    manifest, rows, steps = read_whole_run(path)
    return manifest, rows[rows["error"].isna()], steps


def read_whole_run(path: Path) -> tuple[RunManifest, pd.DataFrame, pd.DataFrame]:
    """Manifest, all rows and steps.

    Raises:
        ConfigError: it is no single run of a service of ours, is simulated, or has no step log.
    """
    manifest, rows = read_parquet(path)
    steps_path = path.with_suffix(STEPS_SUFFIX)
    if not isinstance(manifest, RunManifest) or manifest.service is None:
        raise ConfigError(f"{path} is not one run of a service of ours")
    if manifest.kind == "simulated":
        raise ConfigError(f"{path} is simulated: only a measured run says anything of a machine")
    if manifest.service and manifest.service.scheduling == "engine":
        raise ConfigError(f"{path} is of an engine's own scheduler: only the lab's is simulated")
    if not steps_path.is_file():
        raise ConfigError(f"there is no step log {steps_path}")
    return manifest, rows, read_steps(steps_path)


def calibrate(path: Path, *, allow_busy: bool = False) -> Calibration:
    """
    Raises:
        ConfigError: as `read_run`, or other processes used the CPU meanwhile and `allow_busy` is not set.
    """
    manifest, rows, steps = read_run(path)
    shares = [entry.machine.other_cpu_share or 0.0 for entry in manifest.repeats]
    notes = refuse_busy(max(shares, default=0.0), path.name, allow_busy=allow_busy)
    card = _card(manifest)
    overheads = fit_overheads(rows, steps, int(card["max_batch_size"]))
    tokens = {str(k): int(n) for k, n in zip(rows["prompt_id"], rows["num_prompt_tokens"], strict=True)}
    cost, quality, ranges = fit_cost(steps)
    names = {entry.name for entry in fields(BackendInfo)}
    return Calibration(
        name=f"{card['model']} on {card['backend']}, {card['device']}",
        source=manifest.run_id,
        info={name: value for name, value in card.items() if name in names} | {"details": {}},
        host={name: getattr(manifest.host, name) for name in ("cpu_model", "cpu_governor", "physical_cores")},
        base=_base(card),
        cost=cost,
        overheads=overheads,
        ranges=ranges,
        fit=quality,
        prompt_tokens=tokens,
        tokens_per_byte=_tokens_per_byte(manifest, tokens),
        notes=notes,
    )


def refuse_busy(others: float, what: str, *, allow_busy: bool) -> tuple[str, ...]:
    """The notes of a calibration whose machine gave this share of its CPU to others.

    Raises:
        ConfigError: it is too much, and `allow_busy` is not set.
    """
    if others <= MAX_OTHER_CPU_SHARE:
        return ()
    told = f"other processes used {others:.0%} of the CPU while {what} was measured"
    if not allow_busy:
        raise ConfigError(f"{told}; measure again on a quiet machine, or pass --allow-busy")
    return (told,)


def settings_of(manifest: RunManifest) -> Settings:
    """The settings of the service that was measured."""
    assert manifest.service is not None
    own = _service_settings(manifest.service.model_dump()["settings"]) | {"variant": manifest.variant}
    return read_settings(own, env_file=None)


def _base(card: Mapping[str, Any]) -> dict[str, str]:
    """Which backend and model, and the options of the backend itself."""
    settings, backend = _service_settings(card["settings"]), str(card["backend"])
    names = ("model", *(entry.name for entry in fields(BACKENDS[backend].options)))
    own = {name.upper(): settings[name] for name in names if name in settings}
    return {"BACKEND": backend} | own


def _service_settings(resolved: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a model card tells them, to be read again."""
    return {
        name: str(int(value) if isinstance(value, bool) else value)
        for name, value in resolved.items()
        if value is not None
    }


def fit_overheads(rows: pd.DataFrame, steps: pd.DataFrame, max_batch: int) -> Overheads:
    """All stamps are on one clock, so only a run on the machine of the service will do."""
    steps = steps.sort_values(["repeat", "start_s"])
    starts = steps["start_s"].to_numpy(dtype=float)
    ends = starts + steps["duration_s"].to_numpy(dtype=float)
    width = (steps["num_rows"] + steps["num_dead_rows"]).to_numpy(dtype=float)
    gaps = starts[1:] - ends[:-1]
    near = (gaps > -_NO_GAP_S) & (gaps < IDLE_S)
    # One step ahead of the device: each begins, in the log, at the very instant at which the last one ended.
    overlaps = bool(near.any() and np.median(gaps[near]) < _NO_GAP_S)
    gap_fixed_s, gap_row_s = line(width[:-1][near], gaps[near])
    stamps = np.concatenate([np.asarray(s, dtype=float) for s in rows["chunk_s"]])
    step = np.searchsorted(ends, stamps) - 1
    deliver_fixed_s, deliver_row_s = line(width[step], stamps - ends[step])
    received = rows["received_s"].to_numpy(dtype=float)
    waits = (received - rows["sent_s"].to_numpy(dtype=float))[~np.isnan(received)]
    submit_s = max(0.0, float(np.median(waits))) if len(waits) else 0.0
    free = (steps["queue_depth"].to_numpy() == 0) & (width < max_batch)
    launched = np.r_[starts[:1], np.where(overlaps & (gaps < _NO_GAP_S), starts[:-1], starts[1:])]
    accept_s = _accept_s(rows, received, launched, ends, free)
    return Overheads(gap_fixed_s, gap_row_s, submit_s, accept_s, deliver_fixed_s, deliver_row_s, overlaps)


def _accept_s(rows: pd.DataFrame, received: Floats, starts: Floats, ends: Floats, free: Floats) -> float:
    """From receiving to the inbox, by requests that found room: they joined the first step after it.

    One that found no step under way began its own. The others say no more than that they were not in the
    inbox when the step before their first one began: without the former, the least value that explains best
    in which step each joined.
    """
    joined = received + rows["queue_s"].to_numpy(dtype=float)
    first = np.searchsorted(starts, joined - 1e-6)
    begun, ended = np.r_[-np.inf, starts], np.r_[-np.inf, ends]  # of the step before
    known = (first < len(starts)) & np.r_[True, free][np.minimum(first, len(free))]
    known &= rows["batch_wait_s"].to_numpy(dtype=float) == 0
    if not known.any():
        return 0.0
    first, received = first[known], received[known]
    low, high = begun[first] - received, starts[first] - received
    tried = np.arange(0.0, 0.02, 0.00005)
    explained = ((low[:, None] < tried) & (tried <= high[:, None])).sum(axis=0)
    best = tried[explained == explained.max()]
    alone = ended[first] < received
    at = float(np.median(high[alone])) if alone.any() else 0.0
    return float(np.clip(at, best[0], best[-1]))


def _card(manifest: RunManifest) -> dict[str, Any]:
    """The model card; the manifest keeps all of it."""
    assert manifest.service is not None
    card = manifest.service.model_dump()
    return card | {"model": manifest.model, "model_digest": manifest.model_digest or ""}


def _tokens_per_byte(manifest: RunManifest, tokens: Mapping[str, int]) -> float:
    corpus = load_corpus(default_path())
    texts = {p.id: p.prompt for p in corpus.prompts if isinstance(p.prompt, str) and p.id in tokens}
    if corpus.sha256 != manifest.corpus.sha256 or not texts:
        return 0.25
    return sum(tokens[name] for name in texts) / sum(len(text.encode()) for text in texts.values())
