"""`lab model`: what it makes, shows, verifies and refuses."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from adapters.base import ConfigError
from adapters.models.packaged import PACKAGED
from adapters.models.presets import PRESETS, Preset
from tools import make_model


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(PRESETS, "lab-tiny", Preset(64, 96, 2, 4, 2, vocab_size=600))
    monkeypatch.setenv("ARTIFACTS_DIR", str(tmp_path / "artifacts"))
    monkeypatch.chdir(tmp_path)  # no .env of the checkout
    return tmp_path / "artifacts"


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    make_model.add_arguments(parser)
    return make_model.run(parser.parse_args(argv))


def test_a_preset_is_made_and_described(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lab-tiny") == 0
    folder = artifacts / "models" / "lab-tiny"
    shown = capsys.readouterr().out
    assert f"lab-tiny: {folder}" in shown
    assert "MB, sha256:" in shown
    assert (folder / "model.safetensors").is_file()


def test_the_settings_name_the_model_and_the_place(
    artifacts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL", "lab-tiny")
    monkeypatch.setenv("BACKEND", "null")
    assert run() == 0
    assert "lab-tiny: " in capsys.readouterr().out
    elsewhere = artifacts.with_name("elsewhere")
    assert run("--artifacts-dir", str(elsewhere)) == 0
    assert (elsewhere / "models" / "lab-tiny").is_dir()


def test_the_list_says_what_is_there(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("lab-tiny")
    capsys.readouterr()
    assert run("--list") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == [*PRESETS, *PACKAGED]
    assert "sha256:" in lines["lab-tiny"]
    assert lines["lab-8b"].endswith("not made")
    assert "8,030.3 M parameters" in lines["lab-8b"]


def test_damage_is_found_and_mended(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lab-tiny", "--verify") == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("lab model: ")
    assert "missing" in complaint
    run("lab-tiny")
    assert run("lab-tiny", "--verify") == 0
    weights = artifacts / "models" / "lab-tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert run("lab-tiny", "--verify") == 1
    assert "model.safetensors" in capsys.readouterr().err
    assert run("lab-tiny", "--force") == 0
    assert run("lab-tiny", "--verify") == 0


def test_only_presets_can_be_verified(artifacts: Path) -> None:
    with pytest.raises(ConfigError, match="lab-26m"):
        run("some/model", "--verify")
    with pytest.raises(ConfigError, match="did you mean"):
        run("lab-tinny")
