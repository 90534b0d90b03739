"""The files of a simulated run: those of a measured one, and a manifest that says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa

from harness.plan.corpus import Corpus
from harness.plan.schedule import Schedule
from harness.replay.provenance import make_manifest, new_run_id
from harness.results.facts import MachineUse
from harness.results.manifest import (
    HostFacts,
    RepeatEntry,
    RunManifest,
    ServiceFacts,
    SimulationFacts,
)
from harness.results.output_dir import free_path, utc_stamp
from harness.results.parquet_file import MANIFEST_KEY
from harness.results.record import ReplayLabels, make_table, to_frame
from harness.results.steps import STEP_SCHEMA, STEPS_SUFFIX, summarise_steps
from harness.results.table_file import write_table
from harness.results.validity import judge
from harness.settings import HarnessSettings
from harness.simulator.calibration import Calibration
from harness.simulator.fleet import Fleet
from harness.simulator.fleet_spec import FleetSpec
from harness.simulator.simulation import Simulated, make_rows


def write_run(
    made: Simulated,
    arm: str,
    settings: HarnessSettings,
    corpus: Corpus,
    schedule: Schedule,
    calibration: Calibration,
) -> tuple[Path, pd.DataFrame, RunManifest]:
    """Rows with columns `replica` and `router`, the step log, and a manifest of kind `simulated`."""
    stamp = utc_stamp()
    variant, model = made.settings.variant, str(made.spec.info.model)
    run_id = f"{new_run_id(stamp)}-simulated"
    manifest = make_manifest(
        run_id=run_id, variant=variant, arm=arm, settings=settings, corpus=corpus, schedule=schedule,
        card=None, served_model=model, is_local=False, planned_repeats=[0],
    )  # fmt: skip
    _describe(manifest, made, calibration)
    labels = ReplayLabels(run_id, variant, arm, made.spec.info.backend, model, 0)
    table = make_table(make_rows(labels, made.flights))
    replicas = pa.array([flight.replica for flight in made.flights], pa.int32())
    routers = pa.array([made.spec.options.router] * len(made.flights), pa.string())
    table = table.append_column("replica", replicas).append_column("router", routers)
    rows = to_frame(table)
    manifest.validity = judge(rows, manifest)
    # Processes that simulate at the same second must not take one name.
    path = free_path(settings.out / "simulated" / variant, run_id.removesuffix("-simulated"))
    raw = manifest.to_json()
    write_table(path, table, MANIFEST_KEY, raw)
    write_table(
        path.with_suffix(STEPS_SUFFIX),
        _step_table(made.fleet, made.spec.options.router, run_id),
        MANIFEST_KEY,
        raw,
    )
    return path, rows, manifest


def _describe(manifest: RunManifest, made: Simulated, calibration: Calibration) -> None:
    settings, spec, fleet = made.settings, made.spec, made.fleet
    strategy: Mapping[str, str | int | float | bool] = {
        "max_batch": settings.max_batch,
        "order": spec.engine.policies.order,
        "step_layout": spec.engine.policies.step_layout,
        "replicas": spec.options.num_replicas,
        "router": spec.options.router,
    }
    manifest.kind = "simulated"
    manifest.simulation = SimulationFacts(
        calibration=calibration.digest,
        in_words=calibration.in_words(),
        num_replicas=spec.options.num_replicas,
        router=spec.options.router,
        is_exact=spec.options.exact,
        outside=calibration.outside(made.most),
        notes=[*calibration.notes, *_operations_in_words(spec)],
    )
    manifest.service = ServiceFacts(
        backend=spec.info.backend, device=f"a simulated {spec.info.device}", dtype=spec.info.dtype,
        num_threads=spec.info.num_threads, scheduling="lab", strategy=dict(strategy),
    )  # fmt: skip
    if calibration.host:
        manifest.host = HostFacts.model_validate(calibration.host)
    manifest.repeats = [
        RepeatEntry(
            repeat=0, ended_at=datetime.now(UTC).isoformat(timespec="seconds"), clock_start_s=0.0,
            wall_s=fleet.now_s, hit_in_flight_cap=fleet.load.hit_in_flight_cap, was_interrupted=False,
            service_problem=None, model_digest=None,
            machine=MachineUse(steal_share=None, other_cpu_share=None, harness_cpu_share=0.0),
            steps=summarise_steps(made.steps, 0),
        )
    ]  # fmt: skip


def _operations_in_words(spec: FleetSpec) -> list[str]:
    told = []
    if spec.options.failures:
        told.append(f"failures drawn: one a replica every {spec.options.failures.every_s:g} s on average")
    if spec.options.autoscaling:
        told.append(f"replicas scaled to {spec.options.autoscaling.target:g} sequences each")
    if set(spec.options.cost_scales) != {1.0}:
        told.append(f"step costs scaled by {', '.join(f'{scale:g}' for scale in spec.options.cost_scales)}")
    return told


def _step_table(fleet: Fleet, router: str, run_id: str) -> pa.Table:
    rows = [
        {"run_id": run_id, "repeat": 0, "replica": index, "router": router, **vars(step)}
        for index, log in enumerate(fleet.steps)
        for step in log
    ]
    schema = STEP_SCHEMA.append(pa.field("replica", pa.int32())).append(pa.field("router", pa.string()))
    return pa.Table.from_pylist(rows, schema=schema)
