"""Sampling on the device against the reference in `adapters.sampling`, over many random settings."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from adapters.base import SamplingParams, Sequence
from adapters.sampling import sample_token

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch.utils._python_dispatch import TorchDispatchMode

from adapters.torch_backend.cuda import sampling as device_sampling
from adapters.torch_backend.cuda.sampling import RowSettings, needs_sampling, row_settings, sample_rows
from adapters.torch_backend.cuda.step_buffers import StepBuffer, TokenTable
from tests.adapters.fake_machine import FakeMachine

VOCAB = 96


def random_params(rng: random.Random, penalties: bool) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 5e-6, 0.3, 1.0, 1.7])
        if penalties
        else rng.choice([0.01, 0.7, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 5, VOCAB, VOCAB + 9]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.3, 1e-9]),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
        seed=rng.randrange(2**63),
        repetition_penalty=rng.choice([1.0, 1.3, 0.7]) if penalties else 1.0,
        presence_penalty=rng.choice([0.0, 0.5, -0.5]) if penalties else 0.0,
        frequency_penalty=rng.choice([0.0, 0.4, -0.2]) if penalties else 0.0,
    )


def sample(logits: Any, sequences: list[Sequence], slots: list[int], table: TokenTable) -> list[int]:
    ints, floats, groups = row_settings(range(len(sequences)), slots, sequences)
    settings = RowSettings(*StepBuffer(FakeMachine()).upload(ints, floats))
    drawn = sample_rows(logits, settings, groups, table.ids)
    tokens: list[int] = drawn.new_full((len(sequences),), -1).index_copy(0, settings.row, drawn).tolist()
    return tokens


@pytest.mark.parametrize("penalties", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_token_as_the_reference(
    penalties: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several parts, several blocks with a rest, and a top_k on either side of the bound.
    for name, value in {"_MAX_ELEMENTS": 5 * VOCAB, "_BLOCK": 20, "_MAX_SELECTED": 50}.items():
        monkeypatch.setattr(device_sampling, name, value)
    rng = random.Random(f"{penalties}/{dtype}")
    generator = torch.Generator().manual_seed(1)
    num_different = num_rows = 0
    for _ in range(60):
        count = rng.randrange(1, 13)
        # Rounded, so that equal logits are common and their order matters.
        logits = (4 * torch.randn(count, VOCAB, generator=generator)).round(decimals=1)
        logits = logits.to(getattr(torch, dtype))
        table = TokenTable(20, 64, torch.device("cpu"))
        table.ids.random_(0, VOCAB, generator=generator)
        slots = rng.sample(range(20), count)
        sequences, want = [], []
        for row in range(count):
            num_prompt, num_output = rng.randrange(1, 30), rng.randrange(0, 20)
            known = table.ids[slots[row]].tolist()
            prompt, output = known[:num_prompt], known[num_prompt : num_prompt + num_output]
            num_pending = rng.randrange(0, 2) if num_output else 0
            seq = Sequence(row, prompt, random_params(rng, penalties))
            seq.output_token_ids, seq.num_pending_tokens = output[: num_output - num_pending], num_pending
            sequences.append(seq)
            want.append(
                sample_token(
                    logits[row].float().numpy().astype(np.float32),
                    seq.params,
                    num_output,
                    prompt_token_ids=prompt,
                    output_token_ids=output,
                )
            )
        got = sample(logits, sequences, slots, table)
        num_rows += count
        num_different += sum(a != b for a, b in zip(got, want, strict=True))
    assert num_rows > 300
    assert num_different == 0


def test_a_token_at_the_border_of_top_p_is_out_as_in_the_reference() -> None:
    logits, table = torch.zeros(1, 4), TokenTable(1, 8, torch.device("cpu"))
    for seed in range(40):
        params = SamplingParams(temperature=1.0, top_p=0.5, seed=seed)
        want = sample_token(logits[0].numpy(), params, 0)
        assert want in (0, 1)
        assert sample(logits, [Sequence(0, [1], params)], [0], table) == [want]


class Watched(TorchDispatchMode):
    """Counts the operators, and the bytes that they read and write, sorts and selections left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name in ("index", "index_put_"):
            assert all(t is None or t.dtype != torch.bool for t in args[1]), "the host would wait for a count"
        if (
            name not in ("sort", "topk", "gather", "scatter_", "index", "slice", "detach")
            and not func.is_view
        ):
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            self.num_bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


@pytest.mark.parametrize(
    ("params", "order", "most_passes"),
    [
        ({"temperature": 1.0}, {}, 5),
        ({"temperature": 1.0, "min_p": 0.1}, {}, 9),
        ({"temperature": 1.0, "top_k": 20, "top_p": 0.9}, {"topk": 1}, 10),
        ({"temperature": 1.0, "top_p": 0.9}, {"sort": 1}, 23),
        ({"temperature": 1.0, "top_p": 0.9, "presence_penalty": 1.0}, {"sort": 1}, 31),
        ({"presence_penalty": 1.0}, {}, 5),
    ],
)
def test_a_row_pays_for_its_own_rules(params: Any, order: Any, most_passes: float) -> None:
    """A pass moves the 8 bytes that a token of the vocabulary takes in fp64."""
    vocab, count = 1 << 15, 4
    logits = torch.zeros(count, vocab, dtype=torch.bfloat16)
    table = TokenTable(count, 8, torch.device("cpu"))
    sequences = [Sequence(i, [1, 2], SamplingParams(**params)) for i in range(count)]
    ints, floats, groups = row_settings(range(count), range(count), sequences)
    settings = RowSettings(*StepBuffer(FakeMachine()).upload(ints, floats))
    with Watched() as watched:
        sample_rows(logits, settings, groups, table.ids)
    assert {name: watched.calls[name] for name in ("sort", "topk") if watched.calls[name]} == order
    assert not {"_local_scalar_dense", "nonzero", "masked_select"} & set(watched.calls)
    assert watched.num_bytes / (8 * count * vocab) < most_passes


def test_memory_is_bounded_whatever_the_batch() -> None:
    assert device_sampling.working_bytes(2, 1000) == 2 * 64_000
    assert (
        device_sampling.working_bytes(256, 128_256) == device_sampling.working_bytes(4096, 128_256) == 1 << 29
    )


def test_who_needs_sampling() -> None:
    def needs(**params: Any) -> bool:
        return needs_sampling(Sequence(0, [1], SamplingParams(**params)))

    assert not needs()
    assert not needs(temperature=1e-6, top_k=5)
    assert needs(temperature=0.1)
    assert needs(presence_penalty=0.1)


def test_known_tokens_replace_unknown_ones_and_all_are_noted() -> None:
    table = TokenTable(3, 8, torch.device("cpu"))
    slots, positions = torch.tensor([2, 0]), torch.tensor([3, 8])
    table.put(slots, positions, torch.tensor([41, 42]))
    ids = table.complete(torch.tensor([-1, 7]), slots, positions)
    assert ids.tolist() == [41, 7]
    assert (table.ids[2, 3], table.ids[0, 8]) == (41, 7)


def test_an_upload_is_one_copy_that_can_grow() -> None:
    buffer = StepBuffer(FakeMachine())
    longer = list(range(3000))
    ints, none, floats = buffer.upload([longer, []], [[0.5, 1e-300]])
    assert ints.tolist() == longer
    assert none.tolist() == []
    assert floats.tolist() == [0.5, 1e-300]
    target = torch.zeros(8, dtype=torch.int64)
    buffer.upload([[1, 2], [3]], into=target)
    assert target.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
