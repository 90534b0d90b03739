"""Every way through the CUDA side gives the plain backend's tokens: windows, kernels, graphs, same bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("transformers", reason="needs the torch extra")

from adapters.torch_backend.cuda import fused
from adapters.torch_backend.cuda.mixed_graphs import MixedGraphs
from adapters.torch_backend.model import flash_attention
from tests.adapters.fake_machine import FakeMachine, PlainOps, row_by_row
from tests.adapters.torch_backend.test_backend import load, make_model, prompts, run_together, sequences_of
from tests.adapters.torch_backend.test_cuda_backend import load_device, run_overlapped


@pytest.fixture(autouse=True)
def fp32_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_DTYPES", (torch.float32, torch.bfloat16))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A model with a window of 24 keys, and its answers to prompts of up to 90 tokens."""
    folder = make_model(tmp_path_factory.mktemp("mistral"), "MistralConfig")
    return folder, run_together(load(folder), sequences_of(prompts(3)))


@pytest.mark.parametrize("invariant", [False, True], ids=["", "batch invariant"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("triton", [True, False], ids=["triton", "plain"])
def test_a_window_on_every_path(
    triton: bool, graphs: bool, invariant: bool, windowed: tuple[Path, list[list[int]]]
) -> None:
    folder, want = windowed
    machine = FakeMachine(attention=row_by_row, ops=PlainOps(row_by_row))
    backend = load_device(
        folder,
        machine,
        max_batch_size=3,  # no multiple of the tiles of 64 rows
        triton_kernels=triton,
        cuda_graphs=graphs,
        batch_invariant=invariant,
    )
    details = backend.info.details
    assert bool(details["cuda_graphs"]) is graphs
    assert bool(details["mixed_cuda_graphs"]) is (graphs and triton)
    assert details["batch_invariant"] is invariant
    assert run_overlapped(backend, sequences_of(prompts(3))) == want


@pytest.mark.parametrize("invariant", [False, True], ids=["", "batch invariant"])
def test_a_full_graph_without_a_sampled_row_has_no_room(
    invariant: bool, windowed: tuple[Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 64 rows inside a prompt: the logits that a graph computes need a row that only pads."""
    folder, _ = windowed
    work = [ids * (130 // len(ids) + 1) for ids in prompts(2)]
    want = run_together(load(folder), sequences_of(work))
    machine = FakeMachine(attention=row_by_row, ops=PlainOps(row_by_row))
    backend = load_device(folder, machine, max_step_tokens=64, batch_invariant=invariant)
    chosen, size_for = [], MixedGraphs.size_for

    def noted(graphs: MixedGraphs, plan: Any) -> int | None:
        size = size_for(graphs, plan)
        chosen.append((len(plan.ids), len(plan.sampled), size))
        return size

    monkeypatch.setattr(MixedGraphs, "size_for", noted)
    assert [run_overlapped(backend, sequences_of([ids]))[0] for ids in work] == want
    assert (64, 0, None) in chosen
    assert any(size == 64 for *_, size in chosen)


def test_kernels_that_do_not_compile_cost_speed_alone(
    windowed: tuple[Path, list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    class CompilationError(Exception):
        """Triton's own is no RuntimeError either."""

    class Broken(PlainOps):
        def attend(self, *args: Any) -> Any:
            raise CompilationError("at 12:4: K >= 16")

    folder, want = windowed
    backend = load_device(folder, FakeMachine(ops=Broken()))
    assert "no Triton kernels here" in caplog.text
    assert backend.info.details["decode_attention"] == "as the others"
    assert run_overlapped(backend, sequences_of(prompts(3))) == want


def test_torch_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("adapters.torch_backend.cuda.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "adapters.torch_backend.cuda.triton_kernels", None)
    assert fused.triton_ops() is None
