"""What CUDA forbids within a capture, and what would make a launch wait, found without a GPU.

The tensors are torch's fake ones of the device `cuda`: shapes, formats and devices without numbers. An
operator that mixes devices or reads a number back fails with them as it would there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.base import SamplingParams, ScheduledChunk, Sequence

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", reason="needs the torch extra")

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapters.torch_backend import loading
from adapters.torch_backend.cuda.mixed_graphs import MixedGraphs
from adapters.torch_backend.cuda.packing import DevicePacker
from adapters.torch_backend.cuda.sampling import NUM_FLOATS, NUM_INTS
from adapters.torch_backend.cuda.step_graphs import CapturedSteps, DecodeGraphs
from adapters.torch_backend.cuda.steps import StepLauncher, decode_rows
from adapters.torch_backend.loading import LoadedModel
from adapters.torch_backend.model.attention import BLOCK
from adapters.torch_backend.model.flash_attention import flash_attention
from adapters.torch_backend.model.kv_cache import SlotCache
from tests.adapters.fake_machine import FakeMachine
from tests.adapters.torch_backend.test_backend import FAMILIES

CUDA = torch.device("cuda")
MAX_BATCH, MAX_LEN = 4, 256
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k and top_p": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "top_p alone": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
    "not to end": {"min_tokens": 9, "ending_token_ids": (3, 5)},
}


class OnDevice(TorchDispatchMode):
    """No operator touches host memory: neither pinned nor, what a capture refuses, pageable."""

    def __init__(self, *, copies: bool) -> None:
        """With `copies`, those that the host does not wait for are fine."""
        super().__init__()
        self._copies = copies
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_operators += 1
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim()}
        if devices > {"cpu"}:
            is_copy = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
            waits = not (kwargs or {}).get("non_blocking", args[2] if len(args) > 2 else False)
            assert (self._copies, is_copy, waits) == (True, True, False), (func, args, kwargs)
        elif not self._copies:
            assert devices <= {"cuda"}, (func, args)
        return out


class DeviceOps:
    """Allocates what the Triton kernels allocate."""

    def norm(self, x: Any, weight: Any, eps: float) -> Any:
        return torch.empty_like(x)

    def rotate_and_store(self, qkv: Any, table: Any, slots: Any, positions: Any, k: Any, v: Any) -> None:
        assert {t.device.type for t in (qkv, *table, slots, positions, k, v)} == {"cuda"}

    def attend(self, q: Any, k: Any, v: Any, spans: Any, *rest: Any) -> Any:
        assert {t.dtype for t in (spans.key_starts, spans.lengths)} == {torch.int32}
        return rest[-1] if torch.is_tensor(rest[-1]) else torch.empty_like(q)

    def gated(self, x: Any) -> Any:
        return x.new_empty(x.shape[0], x.shape[1] // 2)


class Pinned:
    """Host memory that NumPy can write to; to torch it is as fake as the device's."""

    def __init__(self, num_words: int) -> None:
        self._numbers = np.zeros(num_words, dtype=np.int64)
        self._tensor = torch.empty(num_words, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, part: slice) -> Any:
        return self._tensor[part]

    def numpy(self) -> Any:
        return self._numbers

    def copy_(self, source: Any) -> Any:
        return self._tensor.copy_(source)


class Machine(FakeMachine):
    def __init__(self, ops: DeviceOps | None) -> None:
        super().__init__(attention=flash_attention, ops=ops)
        self.device = CUDA

    def pinned(self, num_words: int) -> Any:
        return Pinned(num_words)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    # Under inference mode torch hands out operators whole whose parts alone keep off the missing device.
    real = torch.inference_mode
    monkeypatch.setattr(
        torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else real(mode=False)
    )
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


def loaded(
    family: str, ops: DeviceOps | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LoadedModel:
    config = getattr(transformers, family)(**FAMILIES[family])

    def made(*args: Any) -> Any:
        with CUDA:
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="eager"
            )

    monkeypatch.setattr(loading, "read_weights", made)
    model = loading.load_model(tmp_path, config, torch.bfloat16, CUDA)
    loading.make_batched(model, fast=True, kernels=None, max_len=MAX_LEN, tiled=False, joined=True, fused=ops)
    return model


def packer_of(ops: DeviceOps | None) -> tuple[Machine, DevicePacker]:
    machine = Machine(ops)
    packer = DevicePacker(machine, SlotCache(MAX_BATCH, MAX_LEN), MAX_LEN, BLOCK)
    packer.attention, packer.decode_attention = flash_attention, ops.attend if ops else None
    return machine, packer


def graphs_of(model: LoadedModel, machine: Machine, packer: DevicePacker) -> list[CapturedSteps]:
    decodes: list[CapturedSteps] = [
        DecodeGraphs(
            machine,
            lambda *rows: decode_rows(packer, model.forward, *rows),
            [1, 4],
            packer.cache.scratch_slot,
            NUM_INTS + NUM_FLOATS,
        )
    ]
    if packer.decode_attention is None:
        return decodes
    rest = {"max_batch": MAX_BATCH, "max_rows": 128, "num_weights": 10**6, "num_extra_words": 12}
    return [*decodes, MixedGraphs(machine, packer, model.forward, packer.decode_attention, **rest)]


@pytest.mark.parametrize(
    ("family", "ops"),
    [
        ("LlamaConfig", DeviceOps()),
        ("LlamaConfig", None),
        ("Qwen2Config", DeviceOps()),
        ("Qwen3Config", DeviceOps()),
        ("MistralConfig", None),
        ("Gemma3TextConfig", DeviceOps()),
        ("GPT2Config", None),
        ("GPTNeoXConfig", None),
        ("PhiConfig", None),
    ],
)
def test_what_is_captured_stays_on_the_device(
    family: str, ops: DeviceOps | None, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(family, ops, tmp_path, monkeypatch)
    machine, packer = packer_of(ops)
    for graphs in graphs_of(model, machine, packer):
        for size in graphs.sizes[::-1]:
            graphs._run(size)  # the first one makes what stays
            with OnDevice(copies=False) as mode:
                graphs._run(size)
            assert mode.num_operators > 20
            assert graphs.logits is not None
            assert (graphs.logits.device.type, graphs.logits.shape[1]) == ("cuda", model.config.vocab_size)


@pytest.mark.parametrize("has_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_launch_waits_for_nothing(
    settings: str, has_graphs: bool, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = DeviceOps()
    model = loaded("LlamaConfig", ops, tmp_path, monkeypatch)
    machine, packer = packer_of(ops)
    graphs = graphs_of(model, machine, packer)
    for one in graphs:
        one.capture()
    launcher = StepLauncher(machine, packer, model.forward, *(graphs if has_graphs else [None]))
    first, second = (
        Sequence(i, [7] * n, SamplingParams(**SETTINGS[settings])) for i, n in enumerate([9, 40])
    )
    with OnDevice(copies=True):
        launcher.launch(packer.plan([ScheduledChunk(first, 0, 9)]))
        first.num_pending_tokens += 1
        launcher.launch(packer.plan([ScheduledChunk(first, 9, 1), ScheduledChunk(second, 0, 40)]))
        for seq in (first, second):
            seq.num_pending_tokens += 1
        launcher.launch(packer.plan([ScheduledChunk(first, 10, 1), ScheduledChunk(second, 40, 1)]))
