"""`gpu_bench` on a CPU with very little work: that it runs to its end, and what it does about trouble."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

import pyarrow.parquet as pq

from adapters.base import BackendConfig, BackendError
from adapters.models.presets import PRESETS, Preset
from adapters.torch_backend import loading
from adapters.torch_backend.backend import TorchBackend
from adapters.torch_backend.cuda.kv_memory import fitted_len
from adapters.torch_backend.cuda.sampling import working_bytes
from adapters.torch_backend.model.flash_attention import plain_attention
from tests.adapters.conformance import tiny_llama, torch_backend_of_a_device
from tools import gpu_bench
from tools.engine_drive import Work
from tools.gpu import backend as backend_of_parts
from tools.gpu import measures, paged_attention, processes, shape_model
from tools.gpu.backend import ModelSize, load, loadable, make_work
from tools.gpu.part import PartRun
from tools.gpu.plan import NAMES, QUICK, Part, Sizes, make_plan
from tools.gpu.processes import Bench
from tools.transformers_runs import continuous_batching, load_reference, run_generate

NOT_ON_A_GPU_IMAGE = ("pydantic", "pydantic_settings", "httptools", "fastapi", "uvicorn", "prometheus_client")


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu_bench.add_arguments(parser)
    return parser.parse_args(arguments)


def make_bench(tmp_path: Path, budget_s: float = 60.0) -> Bench:
    return Bench(tmp_path, "cpu", "auto", QUICK, 0, budget_s, str(tmp_path), 1.0, {})


def planted(name: str, limit_s: float = 60.0, **options: Any) -> Part:
    return Part(name, f"tests.tools.planted_parts:{name}", "no-model", 1, limit_s, options)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "rows.parquet").to_pylist()
    return rows


@pytest.mark.timeout(1800)
def test_a_quick_run_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    arguments = ("--device=cpu", "--quick", f"--models={model}", f"--real-model={model}", f"--out={tmp_path}")
    status = gpu_bench.run(parse(*arguments, f"--artifacts-dir={tmp_path}/artifacts"))
    shown = capfd.readouterr().out
    assert status == 0, shown
    (folder,) = (tmp_path / "gpu").iterdir()
    assert {path.name for path in folder.iterdir()} == {"rows.parquet", "tables.md", "log.txt"}
    rows = rows_of(folder)
    by_table = {name: [row for row in rows if row["table"] == name] for name in {r["table"] for r in rows}}
    assert set(by_table) == {
        "loaded", "hardware", "same tokens as generate()", "decode steps", "kernels of a decode step",
        "prompts", "strategies", "sampled decode steps",
        "transformers' continuous batching beside the engine's",
    }  # fmt: skip
    assert {row["name"] for row in by_table["loaded"]} == {
        "same", "steps", "plain", "strategies", "invariant", "sampled", "yardstick, engine",
    }  # fmt: skip
    exact = [row for row in by_table["same tokens as generate()"] if row["dtype"] == "float32"]
    assert [row["equal_answers"] for row in exact] == [QUICK.answers]
    assert {row["name"] for row in by_table["strategies"]} == {"baseline", "static", "dynamic", "continuous"}
    steps = by_table["decode steps"]
    assert {row["name"] for row in steps} == {"decode step", "without Triton kernels", "BATCH_INVARIANT=1"}
    assert all(row["step_ms"] > 0 < row["floor_ms"] for row in steps)
    assert all(row["to_usual"] > 0 for row in steps if row["name"] != "decode step")
    ours, theirs = by_table["transformers' continuous batching beside the engine's"]
    assert ours["tokens"] == theirs["tokens"]
    assert theirs["engine_is_faster"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])
    assert theirs["attention"] == "paged|plain_flash, not comparable"
    facts = json.loads(pq.read_table(folder / "rows.parquet").schema.metadata[b"lab"])
    assert facts["torch_build"] == torch.__version__
    assert facts["host"]["cpu_model"]
    text = (folder / "tables.md").read_text(encoding="utf-8")
    assert "### decode steps" in text
    assert r" paged\|plain_flash, not comparable |" in text
    assert "### decode steps" in shown


def test_it_starts_without_the_packages_of_the_service_and_holds_no_device_memory() -> None:
    # None in sys.modules makes an import fail.
    block = f"import sys; sys.modules |= dict.fromkeys({NOT_ON_A_GPU_IMAGE!r});"
    parent = f"{block} import tools.gpu_bench; assert 'torch' not in sys.modules"
    parts = f"{block} import tools.gpu.part, tools.gpu.parts, tools.gpu.yardstick"
    for code in (parent, parts):
        subprocess.run([sys.executable, "-c", code], check=True)


def test_the_commands_in_the_documents_are_understood() -> None:
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    found = re.findall(r"python3? -m tools\.gpu_bench( --[^`\n]*)?", text)
    assert len(found) > 4
    parts = [parse(*shlex.split(arguments, comments=True)).parts for arguments in found]
    assert set(NAMES) == {name for names in parts if names != list(NAMES) for name in names}


def test_an_80_gb_card_has_room_for_all_work_of_the_largest_model() -> None:
    """Slots of 256 requests are shorter than the model's own length there; prompts are cut to fit."""
    preset, sizes, memory = PRESETS["lab-8b"], Sizes(), 79.2 * 2**30
    used = 2 * preset.num_parameters + 2**30
    kv_bytes = 2 * 2 * preset.num_layers * preset.num_kv_heads * preset.head_dim
    longest = fitted_len(
        free_bytes=int(memory - used),
        fraction=BackendConfig(model="").kv_memory_fraction,
        bytes_per_position=kv_bytes,
        max_batch=max(*sizes.rows, *sizes.concurrency),
        wanted=4096,
        is_given=False,
        reserve_bytes=working_bytes(256, preset.vocab_size),
    )
    assert max(sizes.lengths) * 2 <= longest < 4096
    assert sizes.context + sizes.steps < longest
    for max_model_len in (longest, 600):
        part: Any = argparse.Namespace(seed=0, sizes=sizes)
        work = make_work(part, 256, ModelSize(preset.vocab_size, max_model_len))
        assert max(len(item.token_ids) + item.max_tokens for item in work) <= max_model_len


def test_a_part_that_fails_hangs_or_crashes_costs_only_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench = make_bench(tmp_path)
    for part in (planted("failing"), planted("hanging", 4.0), planted("crashing"), planted("good")):
        bench.run(part)
    assert bench.has_failed
    rows = [(row["table"], row["name"], row["value"]) for row in rows_of(tmp_path)]
    before = [(name, "before", 1.0) for name in ("failing", "hanging", "crashing")]
    assert rows == [*before, ("good", "row", 1.5)]
    assert bench.rows[-1]["earlier"] == 3
    assert bench.facts["answer"] == 42
    failed, ended, hung, crashed, warned = bench.notes
    assert failed == "no-model: FAILED: RuntimeError: CUDA error: no kernel image"
    assert ended.startswith("FAILED: failing of no-model ended with 1; its last lines:")
    assert hung.startswith("FAILED: hanging of no-model was ended after 4 s")
    assert "time.sleep(600)" in (tmp_path / "log.txt").read_text() or "in hanging" in hung
    assert crashed.startswith("FAILED: crashing of no-model ended with -6")
    assert warned == "no-model: the backend warns"
    assert "### good" in capfd.readouterr().out


def test_what_cannot_be_loaded_is_tried_with_less(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.run(planted("loading_without_graphs"))
    way_out = {"cuda_graphs": False}
    assert [note for note in bench.notes if "FAILED" not in note] == [
        "loading_without_graphs of no-model: tried again with {'triton_kernels': False}",
        f"loading_without_graphs of no-model: tried again with {way_out}",
        f"the parts that follow are run with {way_out}",
    ]
    # It has loaded: what fails then is not tried again.
    assert [row["name"] for row in bench.rows] == ["loading_without_graphs", "before", "after it"]
    bench.run(planted("loading_without_graphs"))
    assert sum("tried again" in note for note in bench.notes) == 2
    assert len(bench.rows) == 6


def test_a_model_that_loads_in_no_way_takes_nothing_from_the_others(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    for _ in range(2):
        bench.run(planted("never_loading"))
    assert sum("tried again" in note for note in bench.notes) == 3
    assert bench.way_out == {}


def test_a_process_that_cannot_be_killed_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one that waits within a driver."""

    class Stuck:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def wait(self, timeout_s: float) -> int:
            raise subprocess.TimeoutExpired("part", timeout_s)

        def kill(self) -> None: ...

    monkeypatch.setattr(processes.subprocess, "Popen", Stuck)
    assert processes._run([], tmp_path / "log.txt", 3.0) == "was ended after 3 s"


def test_what_does_not_fit_the_budget_is_skipped_and_said_to_be(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, budget_s=0.5)
    bench.run(planted("good"))
    assert bench.rows == []
    (note,) = bench.notes
    assert note.startswith("skipped: good of no-model (about 1 s")


def test_the_first_model_gets_every_part_before_the_others_get_more_than_steps() -> None:
    plan = [(part.name, part.model) for part in make_plan(NAMES, ["big", "small"], real_model="real")]
    assert plan[:4] == [("same", "real"), ("same", "big"), ("steps", "big"), ("steps", "small")]
    assert plan.index(("yardstick, transformers", "big")) < plan.index(("plain", "small"))
    assert len(plan) == len(set(plan))
    only = make_plan(["steps"], ["big", "small"], real_model="real")
    assert [(part.name, part.model) for part in only] == [("steps", "big"), ("steps", "small")]


def test_a_shape_is_loaded_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "lab-tiny", Preset(64, 96, 2, 2, 1, vocab_size=160))
    read = loading.read_weights
    with shape_model.shape_folder("lab-tiny", tmp_path) as folder:
        backend = TorchBackend(BackendConfig(model=str(folder), device="cpu", num_threads=1))
    assert loading.read_weights is read
    assert backend.info.model == "lab-tiny"
    assert backend.info.num_parameters == PRESETS["lab-tiny"].num_parameters
    assert measures.num_multiplied_weights(backend) == (
        PRESETS["lab-tiny"].num_parameters - 2 * 160 * 64 - 5 * 64,
        160 * 64,
    )


def test_a_part_takes_only_the_shape_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "lab-tiny", Preset(64, 96, 2, 2, 1, vocab_size=160))
    given = {"model": "lab-tiny", "real_weights": False, "options": {}, "artifacts_dir": str(tmp_path)}
    machine = {"device": "cpu", "dtype": "auto", "sizes": QUICK, "seed": 0, "limit_s": 600.0}
    part = PartRun("steps", **given, **machine, facts={}, earlier=[], lines=tmp_path / "lines")
    with loadable(part) as config:
        assert load(part, config).info.num_parameters == PRESETS["lab-tiny"].num_parameters
    assert not (tmp_path / "models").exists()
    assert part.known("dtype", "loaded", name="steps")
    assert part.known("dtype", "loaded", name="strategies") is None
    monkeypatch.setattr(backend_of_parts, "fits_memory", lambda *args: False)
    with pytest.raises(BackendError, match="do not fit"), loadable(part):
        pass


def test_whether_a_shape_fits_depends_on_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2.5 * 4 * PRESETS["lab-26m"].num_parameters
    monkeypatch.setattr(
        shape_model.psutil, "virtual_memory", lambda: argparse.Namespace(available=needed - 1)
    )
    assert not shape_model.fits_memory("lab-26m", "cpu", torch.float32)
    assert shape_model.fits_memory("lab-26m", "cpu", torch.bfloat16)


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

    rows = measures.DecodeRows(backend, 3, 20)
    monkeypatch.setattr(backend, "launch", watched)
    assert measures.step_s(backend, rows.chunks(2), 4) > 0
    assert (flying, most) == (0, 2)
    rows.release()
    assert len(backend._packer.slots._free) == backend.info.max_batch_size


@pytest.mark.parametrize("one_block", [False, True], ids=["keys gathered", "keys in place"])
def test_transformers_batching_gives_the_tokens_of_generate_with_our_attention(
    one_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if one_block and not paged_attention.updates_by_index():
        pytest.skip("the cache of this version of transformers is laid out otherwise")
    calls = []

    def watched(*args: Any) -> Any:
        calls.append(args[4])
        return plain_attention(*args)

    monkeypatch.setattr(paged_attention, "plain_attention", watched)
    model = load_reference(BackendConfig(model=tiny_llama(), device="cpu"), "float32")
    size = model.config.vocab_size
    work = [Work([(3 + 5 * i + 7 * j) % size for j in range(4 + 3 * i)], 5 + i) for i in range(3)]
    want = run_generate(model, work)
    assert paged_attention.choose_attention(model) == "paged|plain_flash"
    with continuous_batching(model, work, one_block=one_block) as answer_all:
        assert answer_all(work, 60.0) == want
        assert answer_all(work[:2], 60.0) == want[:2]
    assert calls
    assert (256 in calls) is one_block  # the length of a block


@pytest.mark.parametrize(
    ("name", "is_fair"),
    [
        ("paged|torch_flash", True),
        ("paged|plain_flash", False),
        ("paged|flash_attention_3", True),
        ("paged|sdpa", False),
    ],
)
def test_which_attention_makes_a_fair_yardstick(name: str, is_fair: bool) -> None:
    assert paged_attention.is_fair(name) is is_fair
