"""Settings: where they come from, which one wins, and what a wrong one says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from adapters.base import ConfigError
from adapters.null_backend import NullOptions
from harness.settings import SETTING_NAMES, HarnessSettings
from services.read_settings import ALIASES, read_settings
from services.settings import all_settings
from tools import env_example

SETTINGS = all_settings().model_fields


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SETTINGS, *ALIASES):
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def test_defaults() -> None:
    settings = read_settings(env_file=None)
    assert (settings.variant, settings.backend, settings.model) == ("continuous", "torch", "lab-26m")
    assert (settings.max_batch, settings.batch_wait_ms, settings.prefill_chunk) == (16, 50.0, 16)
    assert settings.max_queue >= 128
    assert settings.host == "127.0.0.1"


def test_command_line_beats_environment_beats_file(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env_file.write_text("MAX_BATCH=2\nMAX_QUEUE=3\nPORT=4\n")
    monkeypatch.setenv("MAX_BATCH", "5")
    monkeypatch.setenv("max_queue", "6")
    settings = read_settings({"MAX_BATCH": "7"}, env_file)
    assert (settings.max_batch, settings.max_queue, settings.port) == (7, 6, 4)


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias: str, env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = "7" if alias.startswith("max") else "some-name"
    own_name = ALIASES[alias]
    env_file.write_text(f"{alias.upper()}={value}\n")
    assert str(getattr(read_settings(env_file=env_file), own_name)).removesuffix(".0") == value
    monkeypatch.setenv(own_name.upper(), "9")
    assert str(getattr(read_settings(env_file=env_file), own_name)).removesuffix(".0") == "9"


def test_the_own_name_beats_an_alias_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODEL", "other")
    monkeypatch.setenv("MODEL", "own")
    assert read_settings(env_file=None).model == "own"
    monkeypatch.setenv("MODEL", "")
    assert read_settings(env_file=None).model == "other"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("MAX_BACTH=8", "MAX_BACTH, in .env, is not a setting; did you mean MAX_BATCH?"),
        ("BATCH_WAIT=8", "BATCH_WAIT, in .env, is not a setting; did you mean BATCH_WAIT_MS?"),
        ("REQUETS=8", "REQUETS, in .env, is not a setting; did you mean REQUESTS?"),
        ("QQQQ=", r"QQQQ, in .env, is not a setting \(.env.example lists all"),
    ],
)
def test_unknown_names_in_the_file(line: str, sentence: str, env_file: Path) -> None:
    env_file.write_text(line + "\n")
    with pytest.raises(ConfigError, match=sentence):
        read_settings(env_file=env_file, passed_over=SETTING_NAMES)


def test_the_service_passes_over_what_a_measurement_reads_from_the_file(env_file: Path) -> None:
    others = set(SETTING_NAMES) - SETTINGS.keys()
    assert {"requests", "shards", "price_per_hour_usd", "pushgateway_url"} < others
    assert HarnessSettings.model_fields.keys() < set(SETTING_NAMES)
    env_file.write_text("".join(f"{name.upper()}=4\n" for name in others) + "MAX_BATCH=3\n")
    settings = read_settings(env_file=env_file, passed_over=SETTING_NAMES)
    assert settings == read_settings({"MAX_BATCH": 3}, env_file=None)
    with pytest.raises(ConfigError, match="REQUESTS, given, is not a setting"):
        read_settings({"REQUESTS": "4"}, env_file=None)


def test_unknown_names_on_the_command_line_and_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="VARIENT, given, is not a setting; did you mean VARIANT"):
        read_settings({"VARIENT": "static"}, env_file=None)
    monkeypatch.setenv("VARIENT", "static")
    assert read_settings(env_file=None).variant == "continuous"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MAX_BATCH", "many", "MAX_BATCH must be a valid integer.*'many'"),
        ("MAX_BATCH", "0", "MAX_BATCH must be greater than or equal to 1"),
        ("PORT", "70000", "PORT must be less than or equal to 65535"),
        ("BATCH_WAIT_MS", "-1", "BATCH_WAIT_MS must be greater"),
        ("BATCH_WAIT_MS", "nan", "BATCH_WAIT_MS must be"),
        ("PAD_FINISHED", "maybe", "PAD_FINISHED must be a valid boolean"),
        ("VARIANT", "statik", "VARIANT must be one of baseline"),
        ("BACKEND", "tensorflow", "BACKEND must be one of torch"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL must be 'DEBUG'"),
        ("MAX_STEP_TOKENS", "31", r"MAX_STEP_TOKENS is 31.*MAX_BATCH \+ PREFILL_CHUNK = 32"),
    ],
)
def test_values_that_cannot_work(name: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_settings({name: value}, env_file=None)


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"PORT .*; MAX_QUEUE|MAX_QUEUE .*; PORT"):
        read_settings({"PORT": "x", "MAX_QUEUE": "y"}, env_file=None)


def test_old_variant_names() -> None:
    assert read_settings({"VARIANT": "dynamic_batch"}, env_file=None).variant == "dynamic"


@pytest.mark.parametrize(
    ("given", "step_tokens"),
    [({}, 512), ({"MAX_BATCH": "1000"}, 1016), ({"MAX_STEP_TOKENS": "80"}, 80)],
)
def test_step_tokens_hold_a_batch_and_a_chunk(given: dict[str, str], step_tokens: int) -> None:
    spec = read_settings(given, env_file=None).engine_spec()
    assert spec.backend.max_step_tokens == step_tokens


def test_the_engine_gets_what_was_set() -> None:
    given = {
        "VARIANT": "static",
        "N_THREADS": "3",
        "BATCH_WAIT_MS": "20",
        "PAD_FINISHED": "0",
        "BACKEND": "null",
        "NULL_ROW_MS": "2",
    }
    spec = read_settings({**given, "MAX_BATCH": "4", "SCHEDULE_TICK_MS": "5"}, env_file=None).engine_spec()
    assert (spec.variant, spec.pad_finished, spec.tick_s) == ("static", False, 0.005)
    assert (spec.backend.num_threads, spec.backend.max_batch_size) == (3, 4)
    assert spec.backend.options == NullOptions(null_row_ms=2.0)
    assert (spec.strategy.max_batch, spec.strategy.batch_wait_s) == (4, 0.02)


def test_threads_leave_a_core_to_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.cores.usable_cores", lambda: 8)
    assert read_settings(env_file=None).num_threads == 7
    monkeypatch.setattr("adapters.cores.usable_cores", lambda: 1)
    assert read_settings(env_file=None).num_threads == 1


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read_settings(env_file=None).port = 1


def test_the_example_lists_every_setting_with_its_default(env_file: Path) -> None:
    example = env_example.PATH.read_text()
    listed = re.findall(r"^# ([A-Z_]+)=(.*)$", example, re.MULTILINE)
    assert sorted(name.lower() for name, _ in listed) == sorted({*SETTINGS, *SETTING_NAMES})
    env_file.write_text("\n".join(f"{name}={value}" for name, value in listed))
    assert read_settings(env_file=env_file, passed_over=SETTING_NAMES) == read_settings(env_file=None)
    read, bare = (HarnessSettings(_env_file=file) for file in (env_file, None))  # type: ignore[call-arg]
    assert read.model_dump(exclude=set(SETTINGS)) == bare.model_dump(exclude=set(SETTINGS))
    for alias in ALIASES:
        assert re.search(rf"^# .*\b{alias.upper()}\b", example, re.MULTILINE), alias


def test_the_example_is_what_the_settings_say() -> None:
    assert env_example.PATH.read_text() == env_example.text()


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_of_another_encoding_is_one_sentence(env_file: Path, encoding: str) -> None:
    env_file.write_bytes("MAX_BATCH=2  # größer\n".encode(encoding))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_settings(env_file=env_file)
