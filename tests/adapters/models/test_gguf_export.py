"""The export to GGUF: the same logits and token ids as transformers has, and files that appear whole."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.base import ConfigError, LabError, UnsupportedModel
from adapters.models.gguf.store import resolve_gguf
from adapters.models.presets import CORPUS_PATH, PRESETS, Preset
from adapters.registry import load_tokenizer

pytest.importorskip("llama_cpp", reason="needs the llama extra")
gguf = pytest.importorskip("gguf", reason="needs the llama extra")

from adapters.llama_cpp_backend.backend import LlamaCppBackend
from adapters.models.gguf.export import export_gguf
from tests.adapters.chat import chat_token_ids
from tests.adapters.conformance import write_byte_tokenizer
from tests.adapters.llama_files import answer, config

pytestmark = pytest.mark.llama

UNICODE = [
    "",
    " ",
    "  hi\n\n\tx  ",
    "naïve café 東京 🙂🏳️‍🌈 e\u0301 \u202e",
    "a<|endoftext|>b",
    "\0\1",
    "I'll 'S 3.14",
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRESETS, "lab-tiny", Preset(256, 512, 2, 4, 2, vocab_size=600))
    return "lab-tiny"


# The same weights


LLAMAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "heads wider than the model": {"head_dim": 32},
    "Llama 3.1's rotary scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear rotary scaling": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    },
}


@pytest.mark.parametrize("case", LLAMAS)
def test_the_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(vocab_size=258, num_hidden_layers=2, **shape, **LLAMAS[case])
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    write_byte_tokenizer(str(folder))
    prompt = [random.Random(case).randrange(256) for _ in range(200)]
    with torch.no_grad():
        want = model(torch.tensor([prompt])).logits[0, -1].numpy()
    backend = LlamaCppBackend(config(f"{folder}:f32", tmp_path))
    answer(backend, prompt, 1)
    assert np.abs(backend.logits(1)[0] - want).max() < 1e-3 * np.abs(want).max()
    backend.close()


@pytest.mark.parametrize("file_format", ["f32", "bf16", "q8_0", "q4_1", "q4_k_m", None])
def test_a_preset_runs_in_every_format(tiny: str, file_format: str | None, tmp_path: Path) -> None:
    name = tiny if file_format is None else f"{tiny}:{file_format}"
    backend = LlamaCppBackend(config(name, tmp_path))
    assert backend.info.model == tiny
    assert backend.info.dtype == (file_format or "q4_k_m")
    assert backend.info.num_parameters == PRESETS[tiny].num_parameters
    assert len(set(answer(backend, list(range(40)), 12))) > 2
    backend.close()


def test_dtype_names_a_format_too(tiny: str, tmp_path: Path) -> None:
    assert resolve_gguf(config(tiny, tmp_path, dtype="fp32")).path.name == "lab-tiny-f32.gguf"
    with pytest.raises(
        ConfigError, match="DTYPE=int3: BACKEND=llama_cpp has bf16, f16, f32, q4_1, q4_k_m, q8_0"
    ):
        resolve_gguf(config(tiny, tmp_path, dtype="int3"))


# The same tokens


@pytest.mark.parametrize("source", ["corpus", "unicode"])
def test_text_has_the_same_token_ids_on_both_sides(source: str, artifacts: Path) -> None:
    lines = CORPUS_PATH.read_text("utf-8").splitlines()
    texts = UNICODE if source == "unicode" else [json.loads(line)["prompt"] for line in lines if line]
    file = resolve_gguf(config("lab-26m", artifacts))
    ours, theirs = (load_tokenizer(config(m, artifacts)) for m in ("lab-26m", file.path))
    assert [theirs.encode(text) for text in texts] == [ours.encode(text) for text in texts]


def test_ids_have_the_same_text_on_both_sides(artifacts: Path) -> None:
    file = resolve_gguf(config("lab-26m", artifacts))
    ours, theirs = (load_tokenizer(config(m, artifacts)) for m in ("lab-26m", file.path))
    rng = random.Random(0)
    ids = [rng.randrange(ours.vocab_size) for _ in range(3000)]
    assert theirs.decode(ids) == ours.decode(ids)
    stream = theirs.stream()
    assert "".join([*(stream.push([i]) for i in ids), stream.flush()]) == ours.decode(ids)
    assert (theirs.vocab_size, theirs.eos_token_ids) == (ours.vocab_size, ours.eos_token_ids)
    assert theirs.special_tokens == ours.special_tokens
    messages = [{"role": "user", "content": "Hi <|endoftext|> there"}]
    assert chat_token_ids(theirs, messages) == chat_token_ids(ours, messages)


def test_a_sentencepiece_like_tokenizer_is_exported(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    lines = CORPUS_PATH.read_text("utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines if line]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts[:100], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    folder = _folder_without_weights(tmp_path, vocab_size=700)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    file = resolve_gguf(config(f"{folder}:f32", tmp_path))
    ours, theirs = (load_tokenizer(config(m, tmp_path)) for m in (folder, file.path))
    for text in [*texts[:50], "東京 🙂", "naïve"]:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def _folder_without_weights(tmp_path: Path, **changes: Any) -> Path:
    """A Llama folder with one-layer weights of zeros, for tests of everything else."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    limits = {"vocab_size": 258, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "model_type": "llama"}
    settings = {**shape, **limits, **changes}
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    at = "model.layers.0"
    shapes = {"model.embed_tokens": (settings["vocab_size"], 32), "lm_head": (settings["vocab_size"], 32)}
    shapes |= {f"{at}.self_attn.{name}_proj": (32, 32) for name in "qkvo"}
    shapes |= {f"{at}.mlp.{name}_proj": (32, 32) for name in ("gate", "up", "down")}
    vectors = ["model.norm", f"{at}.input_layernorm", f"{at}.post_attention_layernorm"]
    header: dict[str, Any] = {}
    offset = 0
    for name, dims in {**shapes, **dict.fromkeys(vectors, (32,))}.items():
        size = 4 * int(np.prod(dims))
        header[f"{name}.weight"] = {"dtype": "F32", "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(offset)
    (folder / "model.safetensors").write_bytes(content)
    return folder


# What cannot be exported


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model_type": "qwen3"},
            UnsupportedModel,
            "is a qwen3 model; only Llama's architecture is exported",
        ),
        ({"rope_scaling": {"type": "yarn"}}, UnsupportedModel, "yarn rotary scaling is not exported"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "uses gelu"),
        ({}, UnsupportedModel, r"no tokenizer\.json"),
    ],
)
def test_what_cannot_be_exported_is_named(
    changes: dict[str, Any], error: type[LabError], message: str, tmp_path: Path
) -> None:
    folder = _folder_without_weights(tmp_path, **changes)
    with pytest.raises(error, match=message):
        resolve_gguf(config(f"{folder}:f32", tmp_path))
    assert not list(tmp_path.rglob("*.gguf"))


def test_cut_off_weights_are_named(tmp_path: Path) -> None:
    folder = _folder_without_weights(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors is cut off"):
        resolve_gguf(config(folder, tmp_path))


# Files that appear whole or not at all


def test_a_file_is_made_once_and_again_when_it_is_damaged(tiny: str, tmp_path: Path) -> None:
    file = resolve_gguf(config(tiny, tmp_path))
    assert file.path == tmp_path / "models" / "lab-tiny-gguf" / "lab-tiny-q4_k_m.gguf"
    made = file.path.stat().st_mtime_ns
    assert resolve_gguf(config(tiny, tmp_path)) == file
    assert file.path.stat().st_mtime_ns == made
    content = file.path.read_bytes()
    file.path.write_bytes(content[:-5])
    assert resolve_gguf(config(tiny, tmp_path)) == file
    assert file.path.read_bytes() == content
    assert not list(tmp_path.rglob(".making*"))


def test_processes_that_ask_at_once_get_the_same_file(tmp_path: Path) -> None:
    script = (
        "import sys; from adapters.base import BackendConfig; "
        "from adapters.models.gguf.store import resolve_gguf; "
        "print(resolve_gguf(BackendConfig(backend='llama_cpp', model='lab-26m:q8_0', "
        "artifacts_dir=sys.argv[1])).digest)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {maker.communicate(timeout=150)[0].strip() for maker in makers}
    assert len(digests) == 1
    assert digests.pop().startswith("sha256:")
    assert not list(tmp_path.rglob(".making*"))


def test_a_model_split_into_several_files_is_served(
    tiny: str, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LlamaCppBackend(config(f"{tiny}:bf16", artifacts))
    want = answer(whole, [5, 6, 7], 8)
    whole.close()
    real = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda target, arch: real(target, arch, split_max_tensors=5))
    export_gguf(artifacts / "models" / tiny, tmp_path / "big.gguf", "big")
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2
    for named in (tmp_path, parts[1]):
        file = resolve_gguf(config(named, artifacts))
        assert (file.path, file.name) == (parts[0], "big")
    backend = LlamaCppBackend(config(tmp_path, artifacts))
    assert answer(backend, [5, 6, 7], 8) == want
    backend.close()
    damaged = bytearray(parts[-1].read_bytes())
    damaged[-1] ^= 1
    parts[-1].write_bytes(damaged)
    assert resolve_gguf(config(tmp_path, artifacts)).digest != file.digest
    parts[-1].unlink()
    with pytest.raises(ConfigError, match="is missing: the model is split"):
        resolve_gguf(config(tmp_path, artifacts))
