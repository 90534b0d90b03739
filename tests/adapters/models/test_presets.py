"""Seeded presets: the same bytes everywhere, exact in every number format, and text that keeps changing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adapters.models import presets as seeded_model
from adapters.models.digests import folder_digest
from adapters.models.preset_tokenizer import END_OF_TEXT_ID, write_tokenizer
from adapters.models.presets import PRESETS, Preset, Tensor, bf16_bits, tensors, write_model
from adapters.text.tokenizer import HFTokenizer
from tests.adapters.chat import chat_token_ids

TINY = Preset(64, 96, 2, 4, 2, vocab_size=600)


@pytest.fixture(scope="module")
def default_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab-26m")
    write_model("lab-26m", folder)
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    return "tiny"


def as_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


def all_bits(preset: str, tensor: Tensor) -> np.ndarray:
    return np.concatenate(list(bf16_bits(preset, tensor)))


def test_the_default_model_is_the_same_everywhere(default_folder: Path) -> None:
    """A golden value. A change of the corpus changes it (the tokenizer learns from it). For any other
    change RECIPE must go up, so that models made before are made anew."""
    assert folder_digest(default_folder) == (
        "sha256:b4e9eda291ba5db43a734be5f3a95326b411da15f14da3cc2f15f079382a6e71"
    )


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("lab-26m", 29_368_832), ("lab-110m", 88_099_584), ("lab-1b", 1_100_048_384), ("lab-8b", 8_030_261_248)],
)
def test_presets_have_the_size_of_their_models(name: str, num_parameters: int) -> None:
    preset = PRESETS[name]
    assert preset.num_parameters == num_parameters
    assert preset.max_positions >= 4096
    assert all(t.exponent is None or -16 <= t.exponent <= -8 for t in tensors(preset))


@pytest.mark.parametrize("name", PRESETS)
def test_weights_are_odd_integers_times_a_power_of_two(name: str) -> None:
    tensor = next(t for t in tensors(PRESETS[name]) if t.name.endswith("k_proj.weight"))
    values = as_float32(next(bf16_bits(name, tensor)))[:100_000]
    assert tensor.exponent is not None
    integers = values / 2.0**tensor.exponent
    assert set(np.unique(integers)) == set(range(-255, 256, 2))
    assert abs(integers.mean()) < 2
    assert integers.std() == pytest.approx(147.8, rel=0.02)


def test_fp16_and_fp32_hold_the_weights_exactly() -> None:
    for tensor in tensors(TINY):
        values = as_float32(all_bits("tiny", tensor))
        assert (values.astype(np.float16).astype(np.float32) == values).all()


def test_a_tensor_depends_on_its_name_alone() -> None:
    tensor = Tensor("a.weight", (300, 70), -10)
    assert (all_bits("x", tensor) == all_bits("x", Tensor("a.weight", (70, 300), -10))).all()
    assert (all_bits("x", tensor) != all_bits("x", Tensor("b.weight", (300, 70), -10))).any()
    assert (all_bits("x", tensor) != all_bits("y", tensor)).any()


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = Tensor("a.weight", (1001, 7), -10)
    whole = all_bits("x", tensor)
    monkeypatch.setattr(seeded_model, "_PIECE_WEIGHTS", 1024)
    assert (all_bits("x", tensor) == whole).all()
    assert len(list(bf16_bits("x", tensor))) == 7


def test_shards_hold_what_one_file_holds(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import safe_open

    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    write_model(tiny, one)
    monkeypatch.setattr(seeded_model, "MAX_SHARD_BYTES", 100_000)
    many.mkdir()
    seen: list[tuple[int, int]] = []
    write_model(tiny, many, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == 2 * TINY.num_parameters
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {t.name for t in tensors(TINY)}
    assert len(set(index["weight_map"].values())) > 2
    with safe_open(one / "model.safetensors", "pt") as whole:
        assert set(whole.keys()) == set(index["weight_map"])
        for name, file in index["weight_map"].items():
            with safe_open(many / file, "pt") as shard:
                assert (shard.get_tensor(name) == whole.get_tensor(name)).all()


def test_transformers_loads_the_default_model_and_its_text_keeps_changing(default_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        default_folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == PRESETS["lab-26m"].num_parameters
    tokenizer = HFTokenizer.from_folder(default_folder)
    for text in ("What is a monsoon?", "Write a poem about tea."):
        prompt = torch.tensor([tokenizer.encode(text)])
        with torch.inference_mode():
            output = model.generate(
                prompt, max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        answer = output.sequences[0, prompt.shape[1] :].tolist()
        assert len(set(answer)) >= 36
        logits = torch.stack(output.logits)[:, 0]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).median() > 0.1  # far above fp32 rounding
        probabilities = logits.softmax(-1)
        entropy = -(probabilities * probabilities.log()).sum(-1).mean()
        assert 1 < entropy < 6  # nats, of at most 8.3: neither certain nor flat


def test_every_id_but_the_end_decodes_to_text(default_folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    write_tokenizer(["hello world, hello words and more words to learn from"], 2000, large)
    for folder, vocab_size in ((default_folder, 4096), (large, 2000)):
        tokenizer = HFTokenizer.from_folder(folder)
        assert tokenizer.vocab_size == vocab_size
        assert tokenizer.eos_token_ids == (END_OF_TEXT_ID,)
        assert [i for i in range(vocab_size) if not tokenizer.decode([i])] == [END_OF_TEXT_ID]


def test_filling_tokens_are_never_encoded(tmp_path: Path) -> None:
    text = "hello world, hello words and more words to learn from"
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, vocab_size in ((few, 262), (many, 3000)):
        folder.mkdir()
        write_tokenizer([text], vocab_size, folder)
    learned = HFTokenizer.from_folder(many)
    assert learned.decode(learned.encode(text)) == text
    assert max(learned.encode(text)) < 400
    assert learned.decode(learned.encode("Ünïcode 😀\n\ttabs")) == "Ünïcode 😀\n\ttabs"
    assert len(HFTokenizer.from_folder(few).encode(text)) > len(learned.encode(text))


def test_a_chat_is_spelled_out(default_folder: Path) -> None:
    tokenizer = HFTokenizer.from_folder(default_folder)
    ids = chat_token_ids(tokenizer, [{"role": "user", "content": "Hi there"}])
    assert tokenizer.decode(ids) == "user: Hi there\nassistant:"


def test_the_tokenizer_does_not_depend_on_threads_or_hashes(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from adapters.models.preset_tokenizer import write_tokenizer; "
        "from adapters.models.presets import _corpus_texts; "
        "write_tokenizer(_corpus_texts(), 5000, Path(sys.argv[1]))"
    )
    contents = set()
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = {**os.environ, "RAYON_NUM_THREADS": str(number), "PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=environment)
        contents.add((folder / "tokenizer.json").read_bytes())
    assert len(contents) == 1
