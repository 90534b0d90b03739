"""The torch backend against `generate()`, and a row's bits against every batch it may be in."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from adapters.base import (
    BackendConfig,
    BackendError,
    ConfigError,
    SamplingParams,
    ScheduledChunk,
    Sequence,
    UnsupportedModel,
)
from tests.adapters.configs import make_config

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", reason="needs the torch extra")

from adapters.torch_backend import backend as torch_backend
from adapters.torch_backend import loading
from adapters.torch_backend.backend import TorchBackend
from adapters.torch_backend.cpu.kernels import load_kernels

VOCAB = 199
SHAPE = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**SHAPE, "intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": GQA,
    "Qwen2Config": GQA,
    "Qwen3Config": {**GQA, "head_dim": 32},
    "MistralConfig": {**GQA, "sliding_window": 24},
    "Gemma3TextConfig": {**GQA, "head_dim": 16, "sliding_window": 24},
    "SmolLM3Config": {**GQA, "pad_token_id": 0},
    "GPT2Config": {"vocab_size": VOCAB, "n_embd": 128, "n_layer": 2, "n_head": 4},
    "GPTNeoXConfig": {**SHAPE, "intermediate_size": 96},
    "OPTConfig": {**SHAPE, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "PhiConfig": {**SHAPE, "intermediate_size": 96},
    # Their window is in the mask alone.
    "Qwen2MoeConfig": {
        **GQA,
        "use_sliding_window": True,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "PhimoeConfig": {**GQA, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_model(folder: Path, config_name: str, *, of_bf16: bool = True, **changes: Any) -> Path:
    """A tiny random model whose greedy text is not one repeated token; its matrices are numbers of bf16."""
    config = getattr(transformers, config_name)(**{**FAMILIES[config_name], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
                if of_bf16:
                    parameter.copy_(parameter.bfloat16())
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def run_together(
    backend: TorchBackend, sequences: list[Sequence], *, start_gap: int = 0, chunk: int = 64
) -> list[list[int]]:
    """Answer all; each starts `start_gap` steps after the one before it, prompts cut in chunks."""
    step, unfinished = 0, list(sequences)
    while unfinished:
        chunks = []
        for index, seq in enumerate(sequences):
            if seq not in unfinished or step < index * start_gap:
                continue
            start = seq.num_computed_tokens
            chunks.append(ScheduledChunk(seq, start, min(chunk, seq.num_tokens - start)))
        outputs = {o.seq_id: o.token_ids for o in backend.step(chunks)}
        for item in chunks:
            item.seq.num_computed_tokens += item.num_tokens
            item.seq.output_token_ids += outputs.get(item.seq.seq_id, [])
            if len(item.seq.output_token_ids) == item.seq.params.max_tokens:
                unfinished.remove(item.seq)
                backend.release([item.seq.seq_id])
        step += 1
    return [seq.output_token_ids for seq in sequences]


def sequences_of(token_lists: list[list[int]], num_new: int = 12, **params: Any) -> list[Sequence]:
    return [
        Sequence(i, ids, SamplingParams(max_tokens=num_new, **params)) for i, ids in enumerate(token_lists)
    ]


def load(folder: Path, **changes: Any) -> TorchBackend:
    options = {"max_batch_size": 8, "dtype": "fp32", "num_threads": 1, **changes}
    return TorchBackend(make_config(model=str(folder), **options))


@pytest.mark.parametrize(
    ("cpu_kernels", "of_bf16"),
    [(True, True), (False, True), (True, False)],
    ids=["kernels", "operators", "kernels, but not for products"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_greedy_tokens_as_generate(
    family: str, cpu_kernels: bool, of_bf16: bool, tmp_path: Path
) -> None:
    folder = make_model(tmp_path, family, of_bf16=of_bf16)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    want = []
    for ids in prompts(5):
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        want.append(out[0, len(ids) :].tolist())
    assert len({tuple(tokens) for tokens in want}) > 1, "the model says the same to everyone: a useless test"
    backend = load(folder, cpu_kernels=cpu_kernels)
    assert run_together(backend, sequences_of(prompts(5)), start_gap=2) == want


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "LlamaConfig")


@pytest.mark.parametrize("cpu_kernels", [True, False], ids=["kernels", "operators"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("LlamaConfig", {}),
        ("LlamaConfig", {"intermediate_size": 100}),
        ("LlamaConfig", {"head_dim": 48}),
        ("MistralConfig", {}),
        ("GPT2Config", {}),
    ],
    ids=["llama", "llama-odd-products", "llama-odd-heads", "mistral", "gpt2"],
)
def test_logits_have_the_same_bits_in_every_batch(
    family: str,
    changes: dict[str, Any],
    dtype: str,
    cpu_kernels: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bf16 the kernels can run all of the first Llama; else, and of the others, some parts."""
    folder = make_model(tmp_path, family, **changes)
    backend = load(folder, dtype=dtype, cpu_kernels=cpu_kernels)
    seen: dict[tuple[int, int], Any] = {}
    choose = torch_backend.choose_tokens

    def record(logits: Any, sequences: list[Sequence], likeliest: list[int]) -> list[int]:
        for row, seq in enumerate(sequences):
            key = (seq.num_prompt_tokens, len(seq.output_token_ids))
            bits = logits[row].clone()
            assert torch.equal(seen.setdefault(key, bits), bits), key
            assert likeliest[row] == int(bits.float().numpy().argmax())
        return choose(logits, sequences, likeliest)

    monkeypatch.setattr(torch_backend, "choose_tokens", record)
    token_lists = list({len(p): p for p in prompts(8, 300)}.values())[:6]
    for ids in token_lists:
        run_together(backend, sequences_of([ids], 8))
    num_alone = len(seen)
    run_together(backend, sequences_of(token_lists, 8))
    run_together(backend, sequences_of(token_lists, 8), start_gap=3)
    run_together(backend, sequences_of(token_lists[::-1], 8), start_gap=1, chunk=128)
    assert len(seen) == num_alone == 8 * len(token_lists)


def test_sampled_tokens_depend_on_the_seed_alone(llama: Path) -> None:
    backend = load(llama)
    options = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 7}
    alone = [run_together(backend, sequences_of([ids], **options))[0] for ids in prompts(4)]
    assert run_together(backend, sequences_of(prompts(4), **options), start_gap=1) == alone
    other = run_together(backend, sequences_of(prompts(4), **{**options, "seed": 8}))
    assert other != alone


def test_a_dead_row_gives_nothing_and_disturbs_nobody(llama: Path) -> None:
    backend = load(llama)
    (want,) = run_together(backend, sequences_of([prompts(2)[1]]))
    dead, live = sequences_of(prompts(2))
    backend.step([ScheduledChunk(dead, 0, dead.num_prompt_tokens)])
    while len(live.output_token_ids) < live.params.max_tokens:
        work = ScheduledChunk(live, live.num_computed_tokens, live.num_tokens - live.num_computed_tokens)
        outputs = backend.step([ScheduledChunk(dead, dead.num_prompt_tokens - 1, 1, dead=True), work])
        assert [o.seq_id for o in outputs] == [live.seq_id]
        live.num_computed_tokens = live.num_tokens
        live.output_token_ids += outputs[0].token_ids
    assert live.output_token_ids == want


def test_rows_of_padding_disturb_nobody_and_are_overwritten(llama: Path) -> None:
    backend = load(llama)
    assert backend.info.computes_padding
    want = run_together(load(llama), sequences_of(prompts(2), 8))
    ours = sequences_of(prompts(2), 8)
    for seq in ours:
        (output,) = backend.step([ScheduledChunk(seq, 0, seq.num_tokens)])
        seq.output_token_ids += output.token_ids
    padding = [
        ScheduledChunk(seq, at, 1, dead=True)
        for seq in ours
        for at in range(seq.num_prompt_tokens, seq.num_prompt_tokens + 20)
    ]
    assert backend.step(padding) == []
    for _ in range(7):
        rows = [ScheduledChunk(seq, seq.num_tokens - 1, 1) for seq in ours]
        outputs = {output.seq_id: output.token_ids for output in backend.step(rows)}
        for seq in ours:
            seq.output_token_ids += outputs[seq.seq_id]
    assert [seq.output_token_ids for seq in ours] == want


def test_limits_are_errors_that_leave_the_backend_usable(llama: Path) -> None:
    backend = load(llama, max_batch_size=2, max_model_len=128)
    a, b, c = sequences_of([[5, 6, 7]] * 3)
    backend.step([ScheduledChunk(a, 0, 3), ScheduledChunk(b, 0, 3)])
    with pytest.raises(BackendError, match="all 2 cache slots"):
        backend.step([ScheduledChunk(c, 0, 3)])
    with pytest.raises(BackendError, match="outgrew"):
        backend.step([ScheduledChunk(Sequence(9, [1] * 600, SamplingParams()), 0, 600)])
    backend.release([a.seq_id, 12345])
    assert [o.seq_id for o in backend.step([ScheduledChunk(c, 0, 3)])] == [c.seq_id]


@pytest.mark.parametrize("preset", ["lab-26m", "lab-110m"])
def test_presets_agree_with_their_own_forward(preset: str, tmp_path: Path) -> None:
    config = BackendConfig(model=preset, dtype="bf16", max_batch_size=2, artifacts_dir=str(tmp_path))
    assert 0.0 < float(TorchBackend(config).info.details["self_test_error"]) < 0.1


def test_auto_is_bf16_where_the_compiled_kernels_compute_the_whole_step(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "cpu_has_bf16", lambda: False)
    found = load_kernels(tmp_path / "kernels", torch.bfloat16, 1)
    in_kernels = "bfloat16" if found is not None and found.has_prompts else "float32"
    gpt2 = make_model(tmp_path / "gpt2", "GPT2Config")
    assert load(llama, dtype="auto").info.dtype == in_kernels
    assert load(llama, dtype="auto", cpu_kernels=False).info.dtype == "float32"
    assert load(gpt2, dtype="auto").info.dtype == "float32"


def test_what_cannot_run_is_refused_by_name(tmp_path: Path) -> None:
    bloom = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    transformers.AutoModelForCausalLM.from_config(bloom).save_pretrained(tmp_path / "bloom")
    with pytest.raises(UnsupportedModel, match="BloomForCausalLM does not use"):
        load(tmp_path / "bloom")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = make_model(tmp_path / "rope", "LlamaConfig", rope_parameters=rope)
    kinds = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModel, match="layers of the kind chunked_attention"):
        load(make_model(tmp_path / "chunked", "Qwen3Config", layer_types=kinds))
    with pytest.raises(UnsupportedModel, match="dynamic rotary scaling"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int3"}, "dtype int3"),
        ({"device": "abacus"}, "DEVICE=abacus"),
        ({"max_model_len": 10**6}, "MAX_MODEL_LEN=1000000 is beyond"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(llama, **changes)
