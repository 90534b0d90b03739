"""A whole model in one call of the kernels, against the same weights in torch, in double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", reason="needs the torch extra")

from torch import Tensor

from adapters.torch_backend.cpu.kernels import PARTS, CpuKernels, load_kernels
from adapters.torch_backend.model.kernel_llama import KernelLlama
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.model.llama_shape import llama_shape

MAX_LEN, NUM_SLOTS = 320, 4
SHAPE: dict[str, Any] = {
    "vocab_size": 208,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    found = load_kernels(tmp_path_factory.mktemp("kernels"), torch.bfloat16, 1)
    if found is None or not found.has_prompts:
        pytest.skip("no C++ compiler, or a CPU whose products are not the kernels'")
    return found


def make_module(family: str = "Llama", **changes: Any) -> Any:
    """Random weights that are bf16 numbers; biases too, where the family has some."""
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(3)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul_(0.15).add_(parameter.dim() == 1).bfloat16())
    return module


def make_ours(kernels: CpuKernels, family: str = "Llama", **changes: Any) -> KernelLlama:
    module = make_module(family, **changes).bfloat16()
    shape = llama_shape(module.config)
    assert shape is not None
    assert KernelLlama.covers(shape, kernels)
    return KernelLlama(module, shape, kernels, MAX_LEN)


def answer(model: KernelLlama, ids: list[int], cuts: list[int], slot: int = 1) -> Tensor:
    """Logits of every position; a cut of 1 is a decode row, any other a prompt chunk."""
    cache = SlotCache(NUM_SLOTS, MAX_LEN)
    parts, start = [], 0
    for size in cuts:
        some, places = ids[start : start + size], list(range(start, start + size))
        decodes, prompts = (1, []) if size == 1 else (0, [(0, size)])
        logits, _ = model.run(cache, some, [slot] * size, places, decodes, prompts, range(size))
        parts.append(logits[:size].clone())
        start += size
    assert start == len(ids)
    return torch.cat(parts)


def ids_of(count: int, seed: int = 1) -> list[int]:
    ids: list[int] = torch.randint(208, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"vocab_size": 209, "tie_word_embeddings": True}),
        ("Llama", {"hidden_size": 256, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}),
        ("Llama", {"mlp_bias": True, "attention_bias": True, "num_key_value_heads": 1}),
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": None}),
    ],
)
def test_logits_are_the_models_own(kernels: CpuKernels, family: str, changes: dict[str, Any]) -> None:
    """As a prompt, token by token, and both; with biases, a padded head, a stream wider than all else."""
    ids = ids_of(90)
    with torch.inference_mode():
        want = make_module(family, **changes).double()(torch.tensor([ids])).logits[0]
        ours = make_ours(kernels, family, **changes)
        for cuts in ([90], [1] * 90, [70, *[1] * 20]):
            error = (answer(ours, ids, cuts).double() - want).square().mean().sqrt() / want.std()
            assert error < 0.06, cuts  # bf16 rounds between the operators; a wrong pass is off by about 1


def test_a_row_has_the_same_bits_in_any_company(kernels: CpuKernels) -> None:
    """Three sequences that decode beside the prompt of a fourth, in one step, against each of them alone."""
    model = make_ours(kernels)
    texts = [ids_of(count, seed) for seed, count in enumerate((40, 7, 200, 90))]
    alone = [answer(model, text, [len(text) - 1, 1] if i < 3 else [90]) for i, text in enumerate(texts)]
    cache = SlotCache(NUM_SLOTS, MAX_LEN)
    for slot, text in enumerate(texts[:3]):
        count = len(text) - 1
        model.run(cache, text[:count], [slot] * count, range(count), 0, [(0, count)], [])
    ids = [*(text[-1] for text in texts[:3]), *texts[3]]
    slots, places = [0, 1, 2, *[3] * 90], [39, 6, 199, *range(90)]
    logits, likeliest = model.run(cache, ids, slots, places, 3, [(3, 64), (67, 26)], range(93))
    for slot in range(3):
        assert torch.equal(logits[slot], alone[slot][-1]), slot
    assert torch.equal(logits[3:93], alone[3])
    assert likeliest == logits[:93].float().numpy().argmax(-1).tolist()


def test_threads_change_no_bit(kernels: CpuKernels, tmp_path: Path) -> None:
    two_threads = load_kernels(tmp_path, torch.bfloat16, 2)
    assert two_threads is not None
    ids = ids_of(30)
    one, two = (answer(make_ours(k), ids, [20, *[1] * 10]) for k in (kernels, two_threads))
    assert torch.equal(one, two)


def test_only_the_rows_asked_for_have_logits(kernels: CpuKernels) -> None:
    model, ids = make_ours(kernels), ids_of(12)
    every = answer(model, ids, [12])
    cache = SlotCache(NUM_SLOTS, MAX_LEN)
    logits, likeliest = model.run(cache, ids, [0] * 12, range(12), 0, [(0, 12)], [11, 3])
    assert torch.equal(logits[:2], every[[11, 3]])
    assert len(likeliest) == 2
    assert model.run(cache, ids, [0] * 12, range(12), 0, [(0, 12)], [])[1] == []


def test_a_padded_head_never_wins(kernels: CpuKernels) -> None:
    """All logits are below the zeros of the padding."""
    module = make_module(vocab_size=201).bfloat16()
    with torch.no_grad():
        module.model.norm.weight.fill_(1.0)
        module.model.embed_tokens.weight.fill_(1.0)
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        module.lm_head.weight.fill_(-1.0)
        module.lm_head.weight[200] = -0.5
    shape = llama_shape(module.config)
    assert shape is not None
    model = KernelLlama(module, shape, kernels, MAX_LEN)
    logits, likeliest = model.run(SlotCache(1, 64), [5, 6], [0, 0], [0, 1], 0, [(0, 2)], [0, 1])
    assert logits.shape == (2, 201)
    assert (logits < 0).all()
    assert likeliest == [200, 200]


@pytest.mark.parametrize("wrong", [-1, 208])
def test_an_id_outside_the_vocabulary_is_an_error(kernels: CpuKernels, wrong: int) -> None:
    with pytest.raises(RuntimeError, match="vocabulary of 208"):
        make_ours(kernels).run(SlotCache(1, 64), [5, wrong], [0, 0], [0, 1], 0, [(0, 2)], [1])


def test_another_cache_is_bound_anew(kernels: CpuKernels) -> None:
    model, ids = make_ours(kernels), ids_of(20)
    first, second = SlotCache(1, MAX_LEN), SlotCache(2, 64)
    for cache in (first, second):
        model.run(cache, ids[:19], [0] * 19, range(19), 0, [(0, 19)], [])
    logits = [model.run(cache, ids[19:], [0], [19], 1, [], [0])[0].clone() for cache in (second, first)]
    assert torch.equal(*logits)


def test_parts_take_time_from_the_first_question_on(kernels: CpuKernels) -> None:
    model, ids = make_ours(kernels), ids_of(50)
    answer(model, ids, [49, 1])
    assert set(kernels.take_part_seconds().values()) == {0.0}
    answer(model, ids, [49, 1])
    taken = kernels.take_part_seconds()
    assert list(taken) == list(PARTS)
    assert all(0 < s < 10 for s in taken.values())
    assert set(kernels.take_part_seconds().values()) == {0.0}


@pytest.mark.parametrize("changes", [{"head_dim": 48}, {"intermediate_size": 100}, {"hidden_size": 136}])
def test_what_the_kernels_do_not_cover(kernels: CpuKernels, changes: dict[str, Any]) -> None:
    shape = llama_shape(make_module(**changes).config)
    assert shape is not None
    assert not KernelLlama.covers(shape, kernels)


def test_other_shapes_are_named_none() -> None:
    assert llama_shape(make_module(hidden_act="gelu").config) is None
    assert llama_shape(make_module("Mistral", sliding_window=24).config) is None
    assert llama_shape(make_module("Qwen3", head_dim=32).config) is None
