"""Options, environment and their mistakes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from adapters.base import ConfigError
from harness.results.cost import Price, read_price
from harness.settings import HarnessSettings, ReportSettings, add_setting_options, read_settings
from tools.cli import main


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `.env` and no variables of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in HarnessSettings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def read(*words: str) -> HarnessSettings:
    parser = argparse.ArgumentParser()
    add_setting_options(parser)
    return read_settings(parser.parse_args(words))


def test_defaults_are_those_of_the_readme() -> None:
    settings = read()
    assert (settings.requests, settings.concurrency, settings.rate, settings.repeats) == (64, 16, None, 1)
    assert (settings.out, settings.temperature, settings.num_warmup) == (Path("results"), 0.0, 16)


def test_options_rank_above_the_environment_and_that_above_dotenv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("REQUESTS=1\nCONCURRENCY=2\nSEED=3\nMAX_BATCH=8\n")
    monkeypatch.setenv("CONCURRENCY", "20")
    monkeypatch.setenv("SEED", "30")
    settings = read("--seed", "300")
    assert (settings.requests, settings.concurrency, settings.seed) == (1, 20, 300)


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE", "")
    monkeypatch.setenv("URL", "")
    assert (read().rate, read().url) == (None, None)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--requests", "0"), "REQUESTS=0"),
        (("--requests", "many"), "REQUESTS=many"),
        (("--concurrency", "-1"), "CONCURRENCY=-1"),
        (("--temperature", "3"), "TEMPERATURE=3"),
        (("--variant", "../elsewhere"), "VARIANT=../elsewhere"),
        (("--backend", "nul"), "there is no backend 'nul': BACKEND must be one of torch"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(*words)


def test_warm_up_follows_the_concurrency() -> None:
    assert read("--concurrency", "4").num_warmup == 4
    assert read("--concurrency", "64").num_warmup == 16
    assert read("--warmup", "0").num_warmup == 0


def test_the_key_is_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret-key")
    settings = read()
    assert settings.api_key is not None
    assert "secret-key" not in str(settings.recorded())


def test_a_price_and_a_gateway_may_stand_in_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ReportSettings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / ".env").write_text("PRICE_PER_HOUR_USD=2.5\nPUSHGATEWAY_URL=http://gateway\nMAX_BATCH=8\n")
    assert read_price(None, None) == Price(per_hour_usd=2.5)
    assert ReportSettings().pushgateway_url == "http://gateway"
    monkeypatch.setenv("PRICE_PER_HOUR_USD", "cheap")
    with pytest.raises(ConfigError, match=r"PRICE_PER_HOUR_USD must be a number of dollars.*cheap"):
        read_price(None, None)


def test_the_service_is_told_which_names_are_the_harness_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_text("PUSHGATEWAY_URL=http://gateway\nREQUESTS=4\nPORT=nowhere\n")
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.startswith("lab serve: PORT must be a valid integer")
    (tmp_path / ".env").write_text("PUSHGATEWY_URL=http://gateway\n")
    assert main(["serve"]) == 2
    assert (
        "PUSHGATEWY_URL, in .env, is not a setting; did you mean PUSHGATEWAY_URL?" in capsys.readouterr().err
    )


def test_a_dotenv_of_another_encoding_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("VARIANT=static\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_settings(argparse.Namespace())
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_price(None, None)
