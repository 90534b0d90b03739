"""A backend that the product does not know: what it must bring, and every place where it then turns up."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters.base import BackendConfig, BackendInfo, ConfigError, ScheduledChunk, StepOutput
from adapters.description import BackendDescription, option
from adapters.models.store import split_format
from adapters.registry import BACKENDS, create_backend
from adapters.text.tokenizer import ByteTokenizer
from harness.commands import bench
from harness.comparing.arms import parse_arm
from services import main
from services.read_settings import read_settings
from tests.services.served import serving
from tools import env_example

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class ToyOptions:
    toy_letter: str = option("a", "The letter that every answer is made of.", min_length=1, max_length=1)


class ToyBackend:
    def __init__(self, config: BackendConfig) -> None:
        self._letter = config.options_as(ToyOptions).toy_letter
        max_batch = config.max_batch_size
        self.info = BackendInfo("toy", "toy", "cpu", "none", 257, (256,), max_batch, 512, 512 * max_batch)

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        return [StepOutput(chunk.seq.seq_id, [ord(self._letter)]) for chunk in chunks if chunk.samples]

    def release(self, seq_ids: Seq[int]) -> None: ...

    def close(self) -> None: ...


def load_tokenizer(config: BackendConfig) -> ByteTokenizer:
    return ByteTokenizer()


DESCRIPTION = BackendDescription(
    make=f"{__name__}:ToyBackend",
    tokenizer=f"{__name__}:load_tokenizer",
    extra="toys",
    packages=("toy_engine",),
    options=ToyOptions,
    formats={"toy4": "toy-4-bit"},
    long_prefill_token_thresholds={"cpu": 77},
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "toy", DESCRIPTION)


def test_it_is_served_with_its_option_and_described() -> None:
    with serving(BACKEND="toy", TOY_LETTER="z", MAX_BATCH=4) as served:
        answer = served.post(prompt="Hello", max_tokens=5).json()
        card = served.get("/model").json()
    assert answer["choices"][0]["text"] == "zzzzz"
    assert (card["backend"], card["scheduling"], card["settings"]["toy_letter"]) == ("toy", "lab", "z")
    assert card["strategy"]["long_prefill_token_threshold"] == 77


def test_its_option_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("BACKEND=toy\nTOY_LETTER=q\n")
    assert read_settings(env_file=env_file).engine_spec().backend.options == ToyOptions("q")
    monkeypatch.setenv("TOY_LETTER", "e")
    assert read_settings(env_file=env_file).engine_spec().backend.options == ToyOptions("e")
    with pytest.raises(ConfigError, match="TOY_LETER, given, is not a setting; did you mean TOY_LETTER"):
        read_settings({"TOY_LETER": "x"}, env_file=None)
    with pytest.raises(ConfigError, match=r"TOY_LETTER .*at most 1 character"):
        read_settings({"TOY_LETTER": "xy"}, env_file=None)
    example = env_example.text()
    assert "# --- BACKEND=toy ---" in example
    assert "# The letter that every answer is made of.\n# TOY_LETTER=a\n" in example


def test_help_and_errors_list_it(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    main.add_arguments(parser)
    names = ", ".join(BACKENDS)
    assert names.endswith(", null, toy")
    assert f"what computes: {names}" in " ".join(parser.format_help().split())
    with pytest.raises(ConfigError, match=f"must be one of {names}"):
        read_settings({"BACKEND": "tyo"}, env_file=None)
    with pytest.raises(ConfigError, match=f"must be one of {names}"):
        parse_arm("continuous@BACKEND=tyo")
    assert parse_arm("continuous@BACKEND=toy,TOY_LETTER=b")[1] == {"BACKEND": "toy", "TOY_LETTER": "b"}
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert "--backend" in parser.format_help()


def test_its_formats_are_its_own() -> None:
    config = BackendConfig(backend="toy", model="lab-26m:toy4")
    assert split_format(config, DESCRIPTION.formats) == ("lab-26m", "toy-4-bit")
    config = BackendConfig(backend="toy", model="lab-110m:bf16")
    with pytest.raises(ConfigError, match="BACKEND=toy has no format bf16; it has toy-4-bit"):
        split_format(config, DESCRIPTION.formats)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: BackendConfig) -> None:
        raise ModuleNotFoundError("No module named 'toy_engine'", name="toy_engine")

    monkeypatch.setattr(sys.modules[__name__], "ToyBackend", fail)
    with pytest.raises(ConfigError, match=r"needs the package toy_engine: .*uv sync --extra toys`"):
        create_backend(BackendConfig(backend="toy"))


def test_descriptions_import_no_engine_and_make_reads_their_extras() -> None:
    code = (
        "import json, sys; from adapters.registry import BACKENDS; "
        "engines = {p for d in BACKENDS.values() for p in d.packages}; "
        "print(json.dumps([sorted(engines & sys.modules.keys()), {n: d.extra for n, d in BACKENDS.items()}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)
    imported, extras = json.loads(run.stdout)
    assert imported == []
    for backend, extra in extras.items():
        command = ["make", "-n", "-W", "pyproject.toml", "bench", f"BACKEND={backend}"]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        assert (f"--no-dev --extra {extra}\n" in told) == (extra is not None), told
