"""A calibration is written and read back as it was, and says what kind of knowledge it is."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BackendConfig, ConfigError
from adapters.null_backend import NullBackend, NullOptions
from harness.simulator.calibration import Calibration, null_calibration, read_calibration, write_calibration
from harness.simulator.costs import FittedCost, RooflineCost, StepWork, work_of
from tests.services.virtual_lab import VirtualLab

INFO = {
    "backend": "torch", "model": "m", "device": "cuda", "dtype": "bf16", "vocab_size": 9, "eos_token_ids": (),
    "max_batch_size": 16, "max_model_len": 1024, "kv_capacity_tokens": 16 * 1024,
}  # fmt: skip

ROOFLINE = [entry.name for entry in fields(RooflineCost) if entry.name != "kind"]


def test_a_roofline_is_named_as_one_and_is_read_back(tmp_path: Path) -> None:
    cost = RooflineCost(1e12, 1e14, 16e9, 8e9, 131_072, 1e6, 0.0005)
    made = Calibration(name="8B, 1 TB/s", source="roofline", info=INFO, cost=cost)
    write_calibration(tmp_path / "cal.json", made)
    read = read_calibration(tmp_path / "cal.json")
    assert (read.cost, read.digest) == (cost, made.digest)
    assert "analytic model" in read.in_words()
    # One row is bound by memory, many prompt tokens by arithmetic.
    assert cost.step_s(StepWork(1, 0, 0, 1, 0)) == pytest.approx(0.0165, rel=0.01)
    assert cost.step_s(StepWork(0, 8192, 1, 0, 0)) == pytest.approx(1.311, rel=0.01)


def test_kv_grows_with_the_slots_only_where_each_had_its_own() -> None:
    made = Calibration(name="a", source="t", info=INFO, cost=RooflineCost(1, 1, 1, 1, 1, 1))
    assert made.backend_info(BackendConfig(max_batch_size=32)).kv_capacity_tokens == 32 * 1024
    shared = made.model_copy(update={"info": INFO | {"kv_capacity_tokens": 5000}})
    assert shared.backend_info(BackendConfig(max_batch_size=32)).kv_capacity_tokens == 5000


def test_the_null_formula_is_the_backends_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NULL_STEP_MS", "3")
    monkeypatch.setenv("NULL_ROW_MS", "0.5")
    monkeypatch.setenv("NULL_PROMPT_TOKEN_MS", "0.1")
    cost = null_calibration().cost
    backend = NullBackend(BackendConfig("null", options=NullOptions(3, 0.5, 0.1)))
    lab = VirtualLab("static")
    lab.submit(1, 3, prompt=10)
    lab.submit(2, prompt=20)
    for _ in range(5):
        chunks = lab.step().chunks
        assert cost.step_s(work_of(chunks)) == pytest.approx(backend._cost_s(chunks))


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cal.json"
    with pytest.raises(ConfigError, match="cannot read"):
        read_calibration(path)
    path.write_text('{"name": "x"}')
    with pytest.raises(ConfigError, match="is no calibration: source"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("part", "changed", "told"),
    [
        ("cost", {"knots": []}, "knots and at_rows must be of one length"),
        ("cost", {"knots": [0, 2, 1]}, "knots must rise"),
        ("cost", {"at_rows": [0.1, 0.2, -0.3]}, "at_rows must be 0 or more"),
        ("cost", {"prompt_token_s": math.nan}, "prompt_token_s must be 0 or more, not nan"),
        ("cost", {"kind": "roofline"} | dict.fromkeys(ROOFLINE, 0), "must be above 0"),
        ("overheads", {"gap_row_s": -1}, "gap_row_s must be 0 or more"),
        ("info", {"speed": 1}, "unexpected keyword argument 'speed'"),
    ],
)
def test_what_no_fit_says_is_refused(part: str, changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    cost = FittedCost((0, 1, 2), (0.1, 0.2, 0.3))
    made = Calibration(name="a", source="t", info=INFO, cost=cost).model_dump()
    made[part] = changed if changed.get("kind") else made[part] | changed
    path = tmp_path / "cal.json"
    path.write_text(json.dumps(made))
    with pytest.raises(ConfigError, match=f"is no calibration.*{told}"):
        read_calibration(path)
