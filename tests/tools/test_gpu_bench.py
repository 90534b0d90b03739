"""`gpu_bench` on a CPU with very little work: that it runs to its end, and what it does about trouble."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

import pyarrow.parquet as pq

from adapters.base import BackendConfig
from adapters.models.presets import PRESETS, Preset
from adapters.torch_backend import loading
from adapters.torch_backend.backend import TorchBackend
from tests.adapters.conformance import torch_backend_of_a_device
from tools import gpu_bench
from tools.gpu import measures as gpu_measures
from tools.gpu import parts as gpu_parts
from tools.gpu import shape_model
from tools.gpu_bench import QUICK, Bench


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu_bench.add_arguments(parser)
    return parser.parse_args(arguments)


def make_bench(tmp_path: Path, budget_s: float = 100.0) -> Bench:
    return Bench("cpu", "auto", QUICK, 0, budget_s, tmp_path / "rows.parquet")


def test_a_quick_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--device=cpu", "--models", "lab-26m", "--quick", f"--out={tmp_path}")
    assert gpu_bench.run(parse(*arguments, f"--artifacts-dir={tmp_path}")) == 0
    shown = capsys.readouterr().out
    assert "FAILED" not in shown
    (path,) = tmp_path.glob("gpu/*.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    by_part = {part: [row for row in rows if row["part"] == part] for part in {row["part"] for row in rows}}
    assert set(by_part) == {
        "hardware", "loaded", "same tokens as generate()", "decode steps", "prompts", "strategies",
    }  # fmt: skip
    assert by_part["same tokens as generate()"][0]["mean_equal_tokens"] > 0
    assert {row["name"] for row in by_part["strategies"]} == {"baseline", "static", "dynamic", "continuous"}
    assert {row["name"] for row in by_part["decode steps"]} == {"decode step", "BATCH_INVARIANT=1"}
    assert all(row["step_ms"] > 0 < row["floor_ms"] for row in by_part["decode steps"])
    facts = json.loads(table.schema.metadata[b"lab"])
    assert facts["torch"] == torch.__version__
    assert facts["host"]["cpu_model"]


def test_what_does_not_fit_the_budget_is_skipped_and_said_to_be(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, budget_s=5.0)
    done: list[str] = []
    bench.run("long", lambda: done.append("long"), 60)
    bench.run("short", lambda: done.append("short"), 1)
    assert done == ["short"]
    assert bench.notes[0].startswith("skipped: long (about 60 s")


def test_a_part_that_fails_ends_nothing_else(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)

    def broken() -> None:
        bench.add("steps", "m", "n", value=1.0)
        raise RuntimeError("CUDA error: no kernel image")

    bench.run("steps", broken)
    assert bench.notes == ["FAILED: steps: RuntimeError: CUDA error: no kernel image"]
    assert pq.read_table(bench.path).to_pylist() == [
        {"part": "steps", "model": "m", "name": "n", "value": 1.0}
    ]


def test_a_shape_is_loaded_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "lab-tiny", Preset(64, 96, 2, 2, 1, vocab_size=160))
    read = loading.read_weights
    with shape_model.shape_folder("lab-tiny", tmp_path) as folder:
        backend = TorchBackend(BackendConfig(model=str(folder), device="cpu", num_threads=1))
    assert loading.read_weights is read
    assert backend.info.model == "lab-tiny"
    assert backend.info.num_parameters == PRESETS["lab-tiny"].num_parameters
    assert gpu_measures.num_multiplied_weights(backend) == (
        PRESETS["lab-tiny"].num_parameters - 2 * 160 * 64 - 5 * 64,
        160 * 64,
    )


def test_a_shape_that_fits_no_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "fits_memory", lambda *args: False)
    bench = make_bench(tmp_path)
    gpu_parts.measure_model(bench, "lab-8b")
    assert bench.notes == ["skipped: lab-8b, whose weights do not fit into the memory that is free"]


def test_steps_of_an_overlapping_backend_keep_two_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = torch_backend_of_a_device()
    flying, most = 0, 0
    launch = backend.launch

    class Watched:
        def __init__(self, step: Any) -> None:
            self.step = step

        def result(self) -> Any:
            nonlocal flying
            flying -= 1
            return self.step.result()

    def watched(chunks: Any) -> Watched:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        return Watched(launch(chunks))

    monkeypatch.setattr(backend, "launch", watched)
    assert gpu_measures.decode_step_s(backend, 3, 20, 4) > 0
    assert (flying, most) == (0, 2)
    assert len(backend._packer.slots._free) == backend.info.max_batch_size
