"""`lab model stage` against a hub on loopback: resume, races, damage, silence, and servers that wait."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from adapters.base import BackendConfig, ConfigError
from adapters.models import staging
from adapters.models.artifact import changed_files, lock_path, read_manifest, unfinished_path
from adapters.models.digests import STAGED_MANIFEST
from adapters.models.presets import PRESETS, Preset
from adapters.models.store import make_preset, resolve_model
from tests.adapters.fake_hub import COMMIT, FakeHub, fake_hub
from tools.stage_model import stage_model

WEIGHTS = bytes(range(256)) * (100 << 10)
"""25 MB: huggingface_hub writes pieces of 10 MB, and an answer that breaks goes on after the last of them."""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    small = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "README.md": b"# not needed"}
    with fake_hub(**small) as hub:
        hub.files["model.safetensors"] = WEIGHTS
        hub.files["onnx/model.onnx"] = b"not needed"
        hub.files["model-q8_0.gguf"] = b"GGUF" + WEIGHTS[:5000]
        hub.large |= {"model.safetensors", "model-q8_0.gguf"}
        yield hub


def start_staging(hub: FakeHub | str, target: Path, model: str = "org/model") -> subprocess.Popen[str]:
    url = hub if isinstance(hub, str) else hub.url
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(target.parent / "hf")}
    return subprocess.Popen(
        [sys.executable, "-m", "tools.cli", "model", "stage", model, "--to", str(target)],
        env=environment | {"HF_HUB_DISABLE_XET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def is_whole(target: Path) -> bool:
    names = {path.name for path in target.iterdir()}
    return (
        names == {"config.json", "tokenizer.json", "model.safetensors", STAGED_MANIFEST}
        and (target / "model.safetensors").read_bytes() == WEIGHTS
        and changed_files(target / STAGED_MANIFEST) == []
        and not unfinished_path(target).exists()
    )


def test_a_hub_model_is_staged_with_a_manifest_and_only_once(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "artifacts" / "model"
    status, out, err = ended(start_staging(hub, target))
    assert status == 0, err
    assert is_whole(target)
    manifest = read_manifest(target / STAGED_MANIFEST)
    assert manifest["model"] == "org/model"
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert manifest["digest"] in out
    assert "staged in" in out
    num_requests = len(hub.requests)
    hub.url = "http://127.0.0.1:9"  # a second run needs no hub
    status, out, err = ended(start_staging(hub, target))
    assert status == 0, err
    assert "was staged already" in out
    assert len(hub.requests) == num_requests


def test_one_file_of_a_repository_can_be_staged(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "gguf"
    status, _, err = ended(start_staging(hub, target, "org/model/model-q8_0.gguf"))
    assert status == 0, err
    assert {path.name for path in target.iterdir()} == {"model-q8_0.gguf", STAGED_MANIFEST}
    status, _, err = ended(start_staging(hub, tmp_path / "other", "org/model/none.gguf"))
    assert status == 2
    assert "org/model has no file none.gguf" in err


@pytest.mark.llama
def test_a_gguf_file_of_the_hub_is_a_model_by_its_name(hub: FakeHub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "tools.cli", "model", "--backend", "llama_cpp"]
    for name, status, words in (
        ("org/model/model-q8_0.gguf", 0, "model-q8_0: "),
        ("org/model/none.gguf", 2, "org/model has no such file"),
        ("org/other/none.gguf", 2, "org/other"),
    ):
        result = subprocess.run(
            [*command, name], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == status, result.stderr
        assert words in result.stdout + result.stderr


def test_a_connection_that_breaks_goes_on_where_it_broke(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = [15_000_000]
    status, _, err = ended(start_staging(hub, tmp_path / "model"))
    assert status == 0, err
    assert is_whole(tmp_path / "model")
    ranges = [wanted for name, wanted in hub.requests if name == "model.safetensors"]
    assert ranges[0] is None
    assert [wanted for wanted in ranges[1:] if wanted] != []


def test_a_killed_run_is_continued_by_the_next(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "model"
    hub.stall_after = 15_000_000
    first = start_staging(hub, target)
    assert hub.stalled.wait(30)
    part = unfinished_path(target) / "model.safetensors.part"
    _until(lambda: part.is_file() and part.stat().st_size > 0)
    first.kill()
    ended(first)
    hub.released.set()
    hub.stall_after = None
    assert not target.exists()
    received = part.stat().st_size
    status, _, err = ended(start_staging(hub, target))
    assert status == 0, err
    assert is_whole(target)
    asked = [wanted for name, wanted in hub.requests if name == "model.safetensors"]
    assert asked == [None, f"bytes={received}-"]
    assert len([name for name, _ in hub.requests if name == "config.json"]) == 1


def test_two_at_once_give_one_whole_model(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "model"
    results = [ended(p) for p in [start_staging(hub, target) for _ in range(3)]]
    assert [status for status, _, _ in results] == [0, 0, 0], results
    assert is_whole(target)
    assert len([name for name, _ in hub.requests if name == "model.safetensors"]) == 1
    assert sum("staged in" in out for _, out, _ in results) == 1


def test_damage_on_the_way_is_found_and_the_next_run_mends_it(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("config.json", "model.safetensors"):
        hub.damaged = {name}
        status, _, err = ended(start_staging(hub, target))
        assert status == 2
        assert f"{name} of org/model arrived damaged" in err
        assert not target.exists()
    hub.damaged = set()
    assert ended(start_staging(hub, target))[0] == 0
    assert is_whole(target)


def test_without_a_network_one_sentence_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    status, _, err = ended(start_staging(f"http://127.0.0.1:{port}", tmp_path / "model"))
    assert status == 2
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("lab model: the hub cannot be reached for org/model")
    assert "run again" in lines[0]


def test_an_unknown_model_is_named(hub: FakeHub, tmp_path: Path) -> None:
    status, _, err = ended(start_staging(hub, tmp_path / "model", "org/other"))
    assert status == 2
    assert "the hub has no model org/other" in err


def test_a_file_name_that_leads_outside_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"../../evil.json": b"{}", **hub.files}
    status, _, err = ended(start_staging(hub, tmp_path / "a" / "model"))
    assert status == 2
    assert "names a file outside its folder" in err
    assert not list(tmp_path.rglob("evil.json"))


# Without a hub


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRESETS, "lab-tiny", Preset(64, 96, 2, 4, 2, vocab_size=600))
    return "lab-tiny"


def config(model: str | Path, tmp_path: Path, **changes: object) -> BackendConfig:
    return BackendConfig(model=str(model), artifacts_dir=str(tmp_path), **changes)  # type: ignore[arg-type]


def test_a_staged_preset_is_that_preset(tiny: str, tmp_path: Path) -> None:
    target = tmp_path / "staged"
    staged = stage_model(config(tiny, tmp_path), target)
    assert not staged.was_there
    files = resolve_model(config(target, tmp_path))
    assert files.digest == resolve_model(config(tiny, tmp_path)).digest == staged.digest
    assert stage_model(config(tiny, tmp_path), target).was_there


@pytest.mark.llama
def test_a_preset_is_staged_as_one_gguf_file(tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the llama extra")
    from adapters.models.gguf.store import resolve_gguf

    target = tmp_path / "staged"
    stage_model(config(f"{tiny}:f16", tmp_path, backend="llama_cpp"), target)
    assert [path.name for path in target.glob("*.gguf")] == ["lab-tiny-f16.gguf"]
    file = resolve_gguf(config(target, tmp_path, backend="llama_cpp"))
    assert file.path == target / "lab-tiny-f16.gguf"
    assert file.digest == resolve_gguf(config(f"{tiny}:f16", tmp_path, backend="llama_cpp")).digest


def test_a_folder_that_holds_something_else_is_left_alone(tiny: str, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not made by `lab model stage`"):
        stage_model(config(tiny, tmp_path), target)
    other = tmp_path / "staged"
    stage_model(config(tiny, tmp_path), other)
    with pytest.raises(ConfigError, match="holds lab-tiny; name another folder"):
        stage_model(config("org/model", tmp_path), other)
    (other / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="cut off; remove"):
        stage_model(config(tiny, tmp_path), other)
    assert (target / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="is where lab-tiny itself is kept"):
        stage_model(config(tiny, tmp_path / "new"), tmp_path / "new" / "models" / tiny)


def test_a_server_waits_for_a_model_that_is_being_staged(
    tiny: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_preset(tiny, str(tmp_path))
    target = tmp_path / "artifacts" / "model"
    target.parent.mkdir()

    def stage_slowly() -> None:
        def fill(folder: Path) -> None:
            begun.set()
            time.sleep(0.6)
            for path in source.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())

        staging.stage("slow", target, fill)

    begun = threading.Event()
    stager = threading.Thread(target=stage_slowly)
    stager.start()
    assert begun.wait(10)
    with caplog.at_level("INFO"):
        files = resolve_model(config(target, tmp_path))
    stager.join()
    assert files.folder == target
    assert "waiting for it to be staged, up to 600 s" in caplog.text


def test_the_wait_has_a_limit_and_needs_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with pytest.raises(ConfigError, match="neither a folder here"):
        resolve_model(config(target, tmp_path))  # nobody is at it: no wait
    with pytest.raises(ConfigError, match=r"was not staged within 0\.3 s.*MODEL_WAIT_S"):
        resolve_model(config(target, tmp_path, model_wait_s=0.3))
    unfinished_path(target).mkdir()
    with pytest.raises(ConfigError, match="neither a folder here"):
        resolve_model(config(target, tmp_path))  # what a killed run left is no reason to wait
    monkeypatch.setattr(staging, "DEFAULT_WAIT_S", 0.3)
    with FileLock(lock_path(target)), pytest.raises(ConfigError, match=r"within 0\.3 s"):
        resolve_model(config(target, tmp_path))


def test_lab_model_says_how_staging_is_written(tmp_path: Path) -> None:
    for words in (["stage", "lab-26m"], ["lab-26m", "--to", str(tmp_path / "x")], ["lab-26m", "lab-110m"]):
        result = subprocess.run(
            [sys.executable, "-m", "tools.cli", "model", *words], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert "stage MODEL --to FOLDER" in result.stderr or "one model at a time" in result.stderr


def test_the_manifest_lists_every_file(tiny: str, tmp_path: Path) -> None:
    stage_model(config(tiny, tmp_path), tmp_path / "staged")
    manifest = json.loads((tmp_path / "staged" / STAGED_MANIFEST).read_text())
    on_disk = {path.name for path in (tmp_path / "staged").iterdir()} - {STAGED_MANIFEST}
    assert set(manifest["files"]) == on_disk
    assert COMMIT not in manifest["digest"]


def _until(condition: object, deadline_s: float = 30.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)
