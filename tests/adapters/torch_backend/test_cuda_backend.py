"""The bookkeeping of the CUDA side, on a CPU: a plain attention and graphs that are Python functions."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from adapters.base import (
    BackendConfig,
    BackendError,
    ConfigError,
    OverlappingBackend,
    SamplingParams,
    ScheduledChunk,
    Sequence,
)
from tests.adapters.configs import make_config

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", reason="needs the torch extra")

from adapters.torch_backend import factory, startup
from adapters.torch_backend.backend import TorchBackend
from adapters.torch_backend.cuda import batch_invariance, mixed_graphs
from adapters.torch_backend.cuda.backend import CudaTorchBackend
from adapters.torch_backend.cuda.packing import DevicePacker
from adapters.torch_backend.cuda.startup import CudaSetup
from adapters.torch_backend.cuda.step_graphs import DecodeGraphs, graph_sizes
from adapters.torch_backend.model import flash_attention
from adapters.torch_backend.model.attention import BLOCK
from adapters.torch_backend.model.flash_attention import KeySpans, plain_attention
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.model.linear import TiledLinear
from tests.adapters.fake_machine import FakeMachine, PlainOps, row_by_row
from tests.adapters.torch_backend.test_backend import load, make_model, prompts, run_together, sequences_of

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 7},
    "penalized": {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.4, "presence_penalty": 0.6},
    "greedy, penalized": {"frequency_penalty": 0.8},
    "not to end": {"min_tokens": 6, "ending_token_ids": tuple(range(0, 199, 2))},
    "sampled, not to end": {"temperature": 1.0, "min_tokens": 4, "ending_token_ids": tuple(range(1, 199, 3))},
}


@pytest.fixture(autouse=True)
def fp32_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes fp32 too, so that tokens can be compared with those of the CPU's own path."""
    monkeypatch.setattr(flash_attention, "_DTYPES", (torch.float32, torch.bfloat16))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "LlamaConfig")


def load_device(folder: Path, machine: FakeMachine | None = None, **changes: Any) -> CudaTorchBackend:
    options = {"max_batch_size": 8, "dtype": "fp32", "num_threads": 1, "cpu_kernels": False, **changes}
    return CudaTorchBackend(make_config(model=str(folder), device="cpu", **options), machine or FakeMachine())


def run_overlapped(backend: CudaTorchBackend, sequences: list[Sequence], chunk: int = 64) -> list[list[int]]:
    """Every step is launched before the one before it was read, with the books an engine would keep."""
    pending: list[Any] = []
    step = 0
    by_id = {seq.seq_id: seq for seq in sequences}
    while True:
        chunks = []
        for index, seq in enumerate(sequences):
            left = seq.params.max_tokens - len(seq.output_token_ids) - seq.num_pending_tokens
            if step >= 2 * index and left > 0:
                start = seq.num_computed_tokens
                chunks.append(ScheduledChunk(seq, start, min(chunk, seq.num_tokens - start)))
        if not chunks and not pending and step > 2 * len(sequences):
            return [seq.output_token_ids for seq in sequences]
        launched = None
        if chunks:
            sampling = [c.seq for c in chunks if c.samples]
            launched = backend.launch(chunks)
            for item in chunks:
                item.seq.num_computed_tokens += item.num_tokens
            for seq in sampling:
                seq.num_pending_tokens += 1
        for done in pending:
            for output in done.result():
                seq = by_id[output.seq_id]
                seq.num_pending_tokens -= 1
                seq.output_token_ids += output.token_ids
        pending = [launched] if launched else []
        step += 1


@pytest.mark.parametrize("family", ["LlamaConfig", "MistralConfig", "GPT2Config", "Gemma3TextConfig"])
def test_same_tokens_as_the_plain_backend(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, family)
    want = run_together(load(folder), sequences_of(prompts(5)), start_gap=2)
    machine = FakeMachine()
    backend = load_device(folder, machine)
    assert run_together(backend, sequences_of(prompts(5)), start_gap=2) == want
    assert machine.log.count("capture") == 4
    assert machine.log.count("replay") > 10
    assert backend.info.details["forward"] == ("llama" if family == "LlamaConfig" else "generic")
    assert backend.info.details["attention"] == "flash"


@pytest.mark.parametrize("attention", [plain_attention, None], ids=["flash", "general"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_fused_parts_give_the_same_tokens(graphs: bool, attention: Any, llama: Path) -> None:
    want = run_together(load(llama), sequences_of(prompts(5)), start_gap=2)
    ops = PlainOps()
    machine = FakeMachine(attention=attention, ops=ops)
    backend = load_device(llama, machine, cuda_graphs=graphs)
    assert run_together(backend, sequences_of(prompts(5)), start_gap=2) == want
    assert ops.calls == {"norm", "rotate_and_store", "gated"}
    assert ("replay" in machine.log) is graphs
    assert bool(backend.info.details["mixed_cuda_graphs"]) is (graphs and attention is not None)
    assert backend.info.details["decode_attention"] == "triton"


def test_steps_with_prompts_come_out_of_a_graph(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = run_together(load(llama), sequences_of(prompts(5), **SETTINGS["sampled"]), start_gap=2)
    backend = load_device(llama, FakeMachine(ops=PlainOps()))
    assert backend.info.details["mixed_cuda_graphs"] == len(backend._launcher._mixed_graphs.sizes) > 3
    monkeypatch.setattr(backend._launcher, "_compute", None)
    assert run_overlapped(backend, sequences_of(prompts(5), **SETTINGS["sampled"])) == want


def test_more_prompts_than_a_graph_has_room_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_graphs, "MAX_PROMPTS", 2)
    want = run_together(load(llama), sequences_of(prompts(5)))
    machine = FakeMachine(ops=PlainOps())
    backend = load_device(llama, machine)
    machine.log.clear()
    assert run_together(backend, sequences_of(prompts(5))) == want
    assert "replay" in machine.log


def test_the_device_goes_on_with_the_token_that_the_host_is_told() -> None:
    """Spare logits repeat a row; a product may round its copies differently."""
    ops = PlainOps()
    machine = FakeMachine(ops=ops)
    packer = DevicePacker(machine, SlotCache(4, 256), 256, BLOCK)
    packer.attention = plain_attention

    def forward(ids: Any, layout: Any, rows: Any) -> Any:
        return torch.eye(len(rows))  # the likeliest token depends on nothing but the place

    sizes = {"max_batch": 4, "max_rows": 64, "num_weights": 1, "num_extra_words": 0}
    graphs = mixed_graphs.MixedGraphs(machine, packer, forward, ops.attend, **sizes)
    graphs.capture()
    plan = packer.plan([ScheduledChunk(Sequence(0, [5, 6, 7], SamplingParams()), 0, 3)])
    words = torch.tensor([*chain(*graphs.padded(64, plan))])
    graphs.words[: len(words)].copy_(words)
    graphs.replay(64)
    assert graphs.tokens[0] == 0 == packer.table.ids[plan.slots[0], 3]


def test_a_wrong_graph_is_not_used(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Forgets(PlainOps):
        def attend(self, q: Any, k: Any, v: Any, spans: KeySpans, *rest: Any) -> Any:
            if torch.is_tensor(rest[-1]):
                return rest[-1]  # the rows that decode beside prompts are left out
            return super().attend(q, k, v, spans, *rest)

    backend = load_device(llama, FakeMachine(ops=Forgets()))
    assert backend.info.details["mixed_cuda_graphs"] == 0
    assert backend.info.details["cuda_graphs"] > 0
    assert "NO CUDA graphs" in caplog.text


def test_fused_parts_can_be_turned_off(llama: Path) -> None:
    ops = PlainOps()
    backend = load_device(llama, FakeMachine(ops=ops), triton_kernels=False)
    assert ops.calls == set()
    assert backend.info.details["decode_attention"] == "as the others"


def test_decode_rows_of_a_mixed_step_go_to_their_own_attention(llama: Path) -> None:
    seen: list[Any] = []

    def noted(name: str) -> Any:
        def attend(q: Any, *args: Any) -> Any:
            seen.append((name, len(q)))
            return row_by_row(q, *args)

        return attend

    machine = FakeMachine(attention=noted("prompts"), ops=PlainOps(noted("decodes")))
    backend = load_device(llama, machine, batch_invariant=True, cuda_graphs=False)
    assert backend.info.details["batch_invariant"]
    first, second = (Sequence(i, [5] * n, SamplingParams()) for i, n in enumerate([9, 40]))
    first.output_token_ids += backend.step([ScheduledChunk(first, 0, 9)])[0].token_ids
    seen.clear()
    backend.step([ScheduledChunk(second, 0, 40), ScheduledChunk(first, 9, 1)])
    assert seen == [("decodes", 1), ("prompts", 40)] * 2  # layers


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_overlapping_steps_give_the_same_tokens(settings: str, graphs: bool, llama: Path) -> None:
    params = SETTINGS[settings]
    want = run_together(load(llama), sequences_of(prompts(5), **params), start_gap=2)
    machine = FakeMachine()
    backend = load_device(llama, machine, cuda_graphs=graphs)
    assert run_overlapped(backend, sequences_of(prompts(5), **params)) == want
    assert ("replay" in machine.log) is graphs
    assert run_together(backend, sequences_of(prompts(3), **params)) == want[:3]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_batch_invariant_attention_never_splits_keys(graphs: bool, llama: Path) -> None:
    most = set()

    def watched(*args: Any) -> Any:
        most.add(args[3].max_rows)
        return row_by_row(*args)

    backend = load_device(llama, FakeMachine(attention=watched), batch_invariant=True, cuda_graphs=graphs)
    most.clear()
    run_together(backend, sequences_of(prompts(3)), start_gap=2)
    assert min(most) == 2


@pytest.mark.parametrize(
    ("invariant", "calls"), [(False, [(1, [1, 1]), (40, [40, 7])]), (True, [(40, [1, 1, 40, 7])])]
)
def test_decode_rows_of_a_mixed_step_have_a_call_of_their_own(
    invariant: bool, calls: list[Any], llama: Path
) -> None:
    seen: list[Any] = []

    def watched(*args: Any) -> Any:
        rows = args[3].row_starts.diff().tolist()
        assert len(args[0]) == sum(rows)
        seen.append((args[3].max_rows, rows))
        return row_by_row(*args)

    backend = load_device(llama, FakeMachine(attention=watched), batch_invariant=invariant)
    first, second, third, fourth = (
        Sequence(i, [5] * n, SamplingParams()) for i, n in enumerate([9, 3, 40, 7])
    )
    for seq in (first, second):
        seq.output_token_ids += backend.step([ScheduledChunk(seq, 0, seq.num_prompt_tokens)])[0].token_ids
    seen.clear()
    backend.step(
        [
            ScheduledChunk(third, 0, 40),
            ScheduledChunk(first, 9, 1),
            ScheduledChunk(fourth, 0, 7),
            ScheduledChunk(second, 3, 1),
        ]
    )
    assert seen == calls * 2  # layers


def test_a_lost_device_is_no_error_of_one_step(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load_device(llama, cuda_graphs=False)
    seq = Sequence(0, [5, 6], SamplingParams())

    def lost(*args: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    step = backend.launch([ScheduledChunk(seq, 0, 2)])
    monkeypatch.setattr(step.buffer, "received", lost)
    with pytest.raises(torch.AcceleratorError):
        step.result()
    monkeypatch.setattr(backend._launcher, "forward", lost)
    with pytest.raises(torch.AcceleratorError):
        backend.launch([ScheduledChunk(seq, 0, 2)])


def test_rows_with_and_without_sampling_share_a_step(llama: Path) -> None:
    backend, plain = load_device(llama), load(llama)
    mixed = [
        Sequence(i, ids, SamplingParams(max_tokens=12, **SETTINGS[list(SETTINGS)[i % 4]]))
        for i, ids in enumerate(prompts(6))
    ]
    alone = []
    for seq in mixed:
        alone += run_together(plain, [Sequence(seq.seq_id, seq.prompt_token_ids, seq.params)])
    assert run_overlapped(backend, mixed) == alone


def test_only_this_backend_offers_to_overlap(llama: Path) -> None:
    assert isinstance(load_device(llama), OverlappingBackend)
    plain = factory.create(BackendConfig(model=str(llama), device="cpu", num_threads=1))
    assert type(plain) is TorchBackend
    assert not isinstance(plain, OverlappingBackend)


def test_steps_in_flight_share_no_buffer(llama: Path) -> None:
    backend = load_device(llama)
    first, second = sequences_of(prompts(2))
    steps = [backend.launch([ScheduledChunk(seq, 0, seq.num_prompt_tokens)]) for seq in (first, second)]
    assert steps[0].buffer is not steps[1].buffer
    for step, seq in zip(steps, (first, second), strict=True):
        assert [o.seq_id for o in step.result()] == [seq.seq_id]
    third = Sequence(9, [4, 5], SamplingParams())
    assert backend.launch([ScheduledChunk(third, 0, 2)]).buffer in [step.buffer for step in steps]


def test_a_dead_row_and_an_unfinished_prompt_give_nothing(llama: Path) -> None:
    backend = load_device(llama)
    dead, live, long = (Sequence(i, ids, SamplingParams()) for i, ids in enumerate(prompts(3, 200)))
    for seq in (dead, live):
        seq.output_token_ids += backend.step([ScheduledChunk(seq, 0, seq.num_prompt_tokens)])[0].token_ids
    rows = [
        ScheduledChunk(dead, dead.num_prompt_tokens - 1, 1, dead=True),
        ScheduledChunk(live, live.num_prompt_tokens, 1),
    ]
    assert [o.seq_id for o in backend.step(rows)] == [live.seq_id]
    part = ScheduledChunk(long, 0, 1)
    assert backend.step([part]) == []
    assert [o.seq_id for o in backend.step([rows[1], ScheduledChunk(long, 1, 1), rows[0]])] == [live.seq_id]


def test_capture_failures(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    want = run_together(load(llama), sequences_of(prompts(3)))
    with caplog.at_level(logging.WARNING):
        backend = load_device(llama, FakeMachine(capture_failure=RuntimeError("operation not permitted")))
    assert "NO CUDA graphs" in caplog.text
    assert "operation not permitted" in caplog.text
    assert run_together(backend, sequences_of(prompts(3))) == want
    with pytest.raises(BackendError, match=r"out of memory while capturing.*CUDA_GRAPHS=0"):
        load_device(llama, FakeMachine(capture_failure=torch.OutOfMemoryError("CUDA out of memory")))


def test_graphs_that_replay_wrongly_are_dropped(
    llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replay(graphs: DecodeGraphs, size: int) -> None:
        assert graphs.logits is not None
        graphs.logits.normal_()

    monkeypatch.setattr(DecodeGraphs, "replay", replay)
    with caplog.at_level(logging.WARNING):
        backend = load_device(llama)
    assert "a row out of one is off by" in caplog.text
    assert backend.info.details["cuda_graphs"] == 0


def wrong_for_single_rows(*args: Any) -> Any:
    out = flash_attention.plain_attention(*args)
    return out if args[3].max_rows > 1 else out * 1.5


@pytest.mark.parametrize("attention", [wrong_for_single_rows, None], ids=["wrong", "none"])
def test_without_a_right_attention_the_general_path_serves(
    attention: Any, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        backend = load_device(llama, FakeMachine(attention=attention))
    assert ("WRONG" in caplog.text) is (attention is not None)
    assert "no CUDA graphs" in caplog.text
    assert backend.info.details["attention"] == "general"
    want = run_together(load(llama), sequences_of(prompts(3)))
    assert run_overlapped(backend, sequences_of(prompts(3))) == want


def test_slots_are_as_long_as_memory_allows(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 1,024 bytes a place, 9 slots with the one for scratch, 80% of what is free.
    free = int(9 * 320 * 1024 / 0.8) + 1024
    with caplog.at_level(logging.WARNING):
        backend = load_device(llama, FakeMachine(free_bytes=free))
    assert backend.info.max_model_len == 320
    assert backend.info.kv_capacity_tokens == 8 * 320
    assert "MAX_MODEL_LEN is 320, not 2048" in caplog.text
    with pytest.raises(ConfigError, match="lower MAX_BATCH to 3 or MAX_MODEL_LEN to 320"):
        load_device(llama, FakeMachine(free_bytes=free), max_model_len=700)


def test_out_of_memory_names_settings(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load_device(llama, cuda_graphs=False)

    def fail(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend._launcher, "forward", fail)
    seq = Sequence(0, [5, 6], SamplingParams())
    with pytest.raises(BackendError, match="out of memory in a step of 2 rows: lower MAX_BATCH"):
        backend.launch([ScheduledChunk(seq, 0, 2)])
    monkeypatch.setattr(startup, "_prepare", fail)
    with pytest.raises(BackendError, match="out of memory while loading"):
        load_device(llama)


@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config"])
def test_batch_invariant_products_have_one_row_count(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, family)
    backend = load_device(folder, FakeMachine(attention=row_by_row), batch_invariant=True, max_batch_size=3)
    counts = set()
    product = TiledLinear.product

    def watched(self: TiledLinear, x: Any, activation: str = "none") -> Any:
        counts.add(len(x))
        return product(self, x, activation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiledLinear, "product", watched)
        run_together(backend, sequences_of(prompts(3, 200)), start_gap=2)
    assert counts == {64}
    assert backend.info.details["same_bits_rows"] == "64-64"


def test_a_broken_promise_of_batch_invariance_is_loud(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    product = TiledLinear.product

    def depends_on_the_batch(self: TiledLinear, x: Any, activation: str = "none") -> Any:
        return product(self, x, activation) + 1e-3 * x.abs().mean()

    monkeypatch.setattr(TiledLinear, "product", depends_on_the_batch)
    layer = TiledLinear(torch.eye(8), None, packed=False)
    assert batch_invariance.changed_linears(layer, torch.device("cpu")) == ["linear layer 8 -> 8"]
    monkeypatch.setattr(startup, "_prepare", lambda *args, **options: ("llama", 0.0))
    monkeypatch.setattr(CudaSetup, "make_ready", lambda self, loaded, n: self.check_rows(loaded) or n)
    monkeypatch.setattr(batch_invariance, "forward_is_changed", lambda *args: True)
    with caplog.at_level(logging.WARNING):
        backend = load_device(llama, batch_invariant=True)
    assert "BATCH_INVARIANT does NOT hold here" in caplog.text
    assert backend.info.details["batch_invariant"] is False


def test_the_whole_pass_is_held_against_itself_in_other_batches(llama: Path) -> None:
    backend = load_device(llama, FakeMachine(attention=row_by_row), batch_invariant=True)
    packer = backend._packer
    with torch.inference_mode():
        assert not batch_invariance.forward_is_changed(backend._launcher.forward, packer, 199)

        def crowded(ids: Any, layout: Any, rows: Any) -> Any:
            return backend._launcher.forward(ids, layout, rows) + 1e-4 * layout.num_decode_rows

        assert batch_invariance.forward_is_changed(crowded, packer, 199)
    assert packer.slots.num_slots == len(packer.slots._free)


@pytest.mark.parametrize(
    ("max_batch", "multiple", "sizes"),
    [
        (1, 1, [1]),
        (3, 1, [1, 2, 3]),
        (20, 1, [1, 2, 4, 8, 16, 20]),
        (3, 64, [64]),
        (200, 64, [64, 128, 192, 256]),
    ],
)
def test_graph_sizes(max_batch: int, multiple: int, sizes: list[int]) -> None:
    assert graph_sizes(max_batch, multiple) == sizes


def test_larger_batches_have_no_graph() -> None:
    assert graph_sizes(1000)[-3:] == [240, 248, 256]
    assert len(graph_sizes(1000)) == 35


@pytest.mark.parametrize("max_rows", [1 << 30, 4])
def test_a_sum_within_the_product_is_the_sum_behind_it(max_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, other = (torch.randn(shape, generator=generator) for shape in ((6, 5), (9, 5), (9, 6)))
    layer = TiledLinear(weight, None, packed=False)
    layer.max_rows = max_rows
    want = layer.plus(x, other)
    got = layer._plus_in_place(x, other)
    assert got is other
    assert torch.allclose(got, want, atol=1e-5)
