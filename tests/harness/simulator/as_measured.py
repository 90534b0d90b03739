"""Runs that nobody measured and that say so, for what reads measured ones."""

from __future__ import annotations

import shutil
from pathlib import Path

from harness.results.manifest import RunManifest, ServiceFacts
from harness.results.record import read_parquet, read_table, write_parquet
from harness.results.steps import STEPS_SUFFIX
from harness.simulator.calibration import null_calibration
from tools.cli import main


def measured(tmp_path: Path, variant: str, *load: str) -> Path:
    """A simulated run that says that it was measured."""
    out = tmp_path / f"{variant}{load}"
    asked = ["--calibrate", "null", "--requests", "70", "--out", str(out), "--variants", variant]
    assert main(["simulate", *asked, *load]) == 0
    path = next(path for path in out.rglob("*.parquet") if not path.name.endswith(STEPS_SUFFIX))
    manifest, _ = read_parquet(path)
    assert isinstance(manifest, RunManifest)
    assert manifest.service is not None
    manifest.kind = None
    settings = {"backend": "null", "max_batch": 16, "null_step_ms": 0.1, "null_row_ms": 0.01}
    card = null_calibration().info | {"settings": settings}
    manifest.service = ServiceFacts.model_validate(manifest.service.model_dump() | card)
    as_measured = out / "measured.parquet"
    write_parquet(as_measured, read_table(path), manifest)
    shutil.copy(path.with_suffix(STEPS_SUFFIX), as_measured.with_suffix(STEPS_SUFFIX))
    return as_measured
