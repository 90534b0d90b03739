"""From names to folders: whole presets in spite of kills and races, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from adapters.base import BackendConfig, ConfigError, UnsupportedModel
from adapters.models import artifact, digests
from adapters.models import presets as seeded_model
from adapters.models import store as model_store
from adapters.models.artifact import changed_files, read_manifest
from adapters.models.digests import PRESET_MANIFEST, STAGED_MANIFEST, folder_digest
from adapters.models.presets import PRESETS, Preset
from adapters.models.staging import stage
from adapters.models.store import is_current, make_preset, resolve_model, trained_positions
from adapters.registry import BACKENDS

MAKE = (
    "import sys; from adapters.base import BackendConfig; from adapters.models.store import resolve_model; "
    "print(resolve_model(BackendConfig(model=sys.argv[1], artifacts_dir=sys.argv[2])).digest)"
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRESETS, "lab-tiny", Preset(64, 96, 2, 4, 2, vocab_size=600))
    return "lab-tiny"


def resolve(model: str, artifacts: Path, backend: str = "torch") -> model_store.ModelFiles:
    config = BackendConfig(model=model, artifacts_dir=str(artifacts), backend=backend)
    return resolve_model(config, BACKENDS[backend].formats)


def test_a_missing_preset_is_made_once(tiny: str, tmp_path: Path) -> None:
    files = resolve(tiny, tmp_path)
    assert files.folder == tmp_path / "models" / tiny
    assert (files.name, files.format) == (tiny, None)
    made = (files.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(tiny, tmp_path) == files
    assert (files.folder / "model.safetensors").stat().st_mtime_ns == made
    assert make_preset(tiny, str(tmp_path), force=True) == files.folder
    assert (files.folder / "model.safetensors").stat().st_mtime_ns > made
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [tiny]


def test_the_digest_is_that_of_a_sha256sum_listing(tiny: str, tmp_path: Path) -> None:
    files = resolve(tiny, tmp_path)
    paths = sorted(path for path in files.folder.iterdir() if path.name != PRESET_MANIFEST)
    listing = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in paths)
    assert files.digest == f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"
    assert files.digest == folder_digest(files.folder)
    assert resolve(str(files.folder), tmp_path).digest == files.digest


def test_a_damaged_or_outdated_preset_is_made_anew(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve(tiny, tmp_path)
    weights = files.folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    assert resolve(tiny, tmp_path) == files
    assert weights.read_bytes() == content
    monkeypatch.setattr(model_store, "RECIPE", 10**6)
    assert not is_current(files.folder)
    monkeypatch.undo()
    (files.folder / PRESET_MANIFEST).write_text("[]")
    assert not is_current(files.folder)


def test_weights_damaged_at_equal_size_are_not_served(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve(tiny, tmp_path)
    weights = files.folder / "model.safetensors"
    content = weights.read_bytes()
    assert resolve(tiny, tmp_path) == files
    times = weights.stat()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times leaves them
    assert resolve(tiny, tmp_path) == files
    assert weights.read_bytes() == content

    resolve(tiny, tmp_path)
    monkeypatch.setattr(artifact, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert resolve(tiny, tmp_path) == files


def test_a_damaged_manifest_is_never_believed(tiny: str, tmp_path: Path) -> None:
    manifest = resolve(tiny, tmp_path).folder / PRESET_MANIFEST
    content, sound = manifest.read_bytes(), read_manifest(manifest)
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        manifest.write_bytes(damaged)
        assert read_manifest(manifest) in (sound, {}) or "crc32" not in json.loads(damaged)
        assert is_current(manifest.parent) in (True, False)
        manifest.write_bytes(content[:position])
        assert read_manifest(manifest) in (sound, {})
    manifest.write_bytes(content.replace(b'"digest": "sha256:', b'"digest": "sha256:0', 1))
    assert not is_current(manifest.parent)
    assert resolve(tiny, tmp_path).digest == sound["digest"]


@pytest.mark.parametrize("damage", [("bytes", "bytfs"), ("sha256", "sha25v"), ("files", "filfs")])
def test_a_damaged_manifest_without_a_checksum_is_none(
    damage: tuple[str, str], tiny: str, tmp_path: Path
) -> None:
    """Earlier versions wrote none."""
    files = resolve(tiny, tmp_path)
    manifest = files.folder / PRESET_MANIFEST
    content = json.loads(manifest.read_text())
    del content["crc32"]
    manifest.write_text(json.dumps(content))
    assert resolve(tiny, tmp_path) == files
    manifest.write_text(json.dumps(content).replace(f'"{damage[0]}"', f'"{damage[1]}"', 1))
    assert resolve(tiny, tmp_path) == files


def test_a_staged_folder_that_was_damaged_is_refused(tiny: str, tmp_path: Path) -> None:
    source = resolve(tiny, tmp_path).folder
    target = tmp_path / "staged"
    stage(tiny, target, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True) and None)
    digest = resolve(str(target), tmp_path).digest
    weights = target / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"damaged.*stage it again"):
        resolve(str(target), tmp_path)
    weights.write_bytes(content)
    assert resolve(str(target), tmp_path).digest == digest
    (target / STAGED_MANIFEST).write_bytes(b"{")
    with pytest.raises(ConfigError, match=r"lab_staged.json is damaged.*stage it again"):
        resolve(str(target), tmp_path)


def test_a_new_corpus_means_a_new_tokenizer(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resolve(tiny, tmp_path).digest
    corpus = tmp_path / "prompts.jsonl"
    corpus.write_text(json.dumps({"prompt": "entirely different words"}) + "\n")
    monkeypatch.setattr(seeded_model, "CORPUS_PATH", corpus)
    monkeypatch.setattr(model_store, "CORPUS_PATH", corpus)
    assert resolve(tiny, tmp_path).digest != before


def test_changed_files_are_named(tiny: str, tmp_path: Path) -> None:
    folder = resolve(tiny, tmp_path).folder
    assert changed_files(folder / PRESET_MANIFEST) == []
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert changed_files(folder / PRESET_MANIFEST) == ["model.safetensors"]


def test_a_failed_run_leaves_nothing(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(name: str, folder: Path, progress: object) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_store, "write_model", write_half)
    with pytest.raises(KeyboardInterrupt):
        resolve(tiny, tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] in ([f".{tiny}.lock"], [])


def test_a_killed_run_leaves_nothing_that_counts(tmp_path: Path) -> None:
    models = tmp_path / "models"
    maker = subprocess.Popen([sys.executable, "-c", MAKE, "lab-110m", str(tmp_path)])
    give_up_s = time.monotonic() + 60
    while not list(models.glob(".making-lab-110m/*.safetensors")):
        assert maker.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
    maker.kill()
    maker.wait()
    assert not (models / "lab-110m").exists()
    files = resolve("lab-110m", tmp_path)
    assert changed_files(files.folder / PRESET_MANIFEST) == []
    assert not list(models.glob(".making-*"))


def test_processes_that_ask_at_once_get_the_same_model(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, "lab-26m", str(tmp_path)]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {maker.communicate(timeout=120)[0].strip() for maker in makers}
    assert len(digests) == 1
    folder = tmp_path / "models" / "lab-26m"
    assert changed_files(folder / PRESET_MANIFEST) == []
    assert read_manifest(folder / PRESET_MANIFEST)["digest"] in digests
    assert not list(folder.parent.glob(".making-*"))


def test_torch_stays_unloaded(tmp_path: Path) -> None:
    script = MAKE + "; import sys; assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script, "lab-26m", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("suffix", "backend", "expected"),
    [
        ("bf16", "torch", "bf16"),
        ("f32", "torch", "fp32"),
        ("fp16", "torch", "fp16"),
        ("q8_0", "llama_cpp", "q8_0"),
    ],
)
def test_a_format_may_follow_the_name(
    tiny: str, tmp_path: Path, suffix: str, backend: str, expected: str
) -> None:
    files = resolve(f"{tiny}:{suffix}", tmp_path, backend)
    assert (files.name, files.format) == (tiny, expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lab-26m:q8_0", "BACKEND=torch has no format q8_0; it has fp32, bf16, fp16"),
        ("lab-26m:int4", "no format int4"),
        ("lab-27m", "did you mean lab-26m"),
        ("Lab-26M", "did you mean lab-26m"),
        ("lab110m", "did you mean lab-110m"),
        ("lab-70b", "is not a preset"),
        ("./no/such/folder", "neither a folder here, nor a preset"),
        ("model.gguf", "GGUF"),
    ],
)
def test_names_that_cannot_work_are_refused(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_local_folder_must_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve(str(tmp_path), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    files = resolve(f"{tmp_path}:bf16", tmp_path)
    assert (files.folder, files.name, files.format) == (tmp_path, tmp_path.name, "bf16")
    (tmp_path / "config.json").write_text("{ }")
    assert resolve(str(tmp_path), tmp_path).digest != files.digest


def test_large_files_are_sampled_and_the_digest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SAMPLED_ABOVE_BYTES", 1000)
    monkeypatch.setattr(digests, "_SAMPLE_BYTES", 8)
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 10)
    digest = folder_digest(tmp_path)
    assert digest.startswith("sampled-sha256:")
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 10 + b"!")
    assert folder_digest(tmp_path) != digest


def test_an_unwritable_place_is_named(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match="set ARTIFACTS_DIR elsewhere"):
        resolve(tiny, tmp_path)


def test_a_small_disk_is_noticed_first(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="make room"):
        resolve(tiny, tmp_path)


def hub_error(kind: Any, status: int) -> Exception:
    request = httpx.Request("GET", "http://hub.invalid/api")
    error: Exception = kind("refused", response=httpx.Response(status, request=request))
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: hub_errors.LocalEntryNotFoundError("offline"), "not in the local cache and the hub cannot"),
        (lambda: hub_errors.OfflineModeIsEnabled("offline"), "not in the local cache and the hub cannot"),
        (lambda: hub_error(hub_errors.RepositoryNotFoundError, 404), "the hub has no model org/name"),
        (lambda: hub_error(hub_errors.GatedRepoError, 403), "is gated: accept its terms"),
        (lambda: hub_error(hub_errors.HfHubHTTPError, 500), "downloading org/name failed"),
    ],
)
def test_hub_errors_say_what_to_do(
    error: Callable[[], Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=message):
        resolve("org/name", tmp_path)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_model_is_named_by_its_commit(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    asked: list[list[str]] = []

    def download(repo_id: str, *, allow_patterns: list[str], **kwargs: Any) -> str:
        asked.append(allow_patterns)
        if any(Path(weights).match(pattern) for pattern in allow_patterns):
            (snapshot / weights).touch()
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = resolve("org/name:bf16", tmp_path)
    assert (files.folder, files.name, files.format, files.digest) == (
        snapshot,
        "org/name",
        "bf16",
        "hub:0123abcd",
    )
    assert len(asked) == (1 if weights.endswith("safetensors") else 2)


def test_a_hub_model_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **kwargs: str(tmp_path))
    with pytest.raises(ConfigError, match="no weights"):
        resolve("org/name", tmp_path)


@pytest.mark.parametrize("described", [{}, {"max_position_embeddings": None}])
def test_a_model_that_does_not_say_how_many_positions_it_has_is_refused(described: dict[str, object]) -> None:
    assert trained_positions({"n_positions": 1024}, "gpt2") == 1024
    with pytest.raises(UnsupportedModel, match="does not say how many positions it has"):
        trained_positions(described, "m")
