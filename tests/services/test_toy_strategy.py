"""A strategy that the product does not know: what it must bring, and every place where it then turns up."""

from __future__ import annotations

import argparse
from collections.abc import Sequence as Seq
from typing import ClassVar

import pytest

from adapters.base import ConfigError, Sequence
from services import main
from services.read_settings import read_settings
from services.strategies import VARIANTS
from services.strategies.base import Admission, StrategyConfig
from tests.services.served import serving


class Pairs:
    """Two at a time, when nothing runs."""

    name: ClassVar[str] = "pairs"
    keeps_finished_rows: ClassVar[bool] = False
    takes_groups: ClassVar[bool] = False

    def __init__(self, config: StrategyConfig) -> None: ...

    def admit(
        self, waiting: Seq[Sequence], running: Seq[Sequence], *, now_s: float, draining: bool
    ) -> Admission:
        return Admission(0 if running else 2)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, Pairs.name, Pairs)


def test_it_is_served_and_described() -> None:
    with serving(BACKEND="null", VARIANT="pairs") as served:
        answer = served.post(prompt=["a", "b", "c", "d"], max_tokens=5).json()
        card = served.get("/model").json()
        steps = served.get("/steps").json()["steps"]
        assert 'strategy="pairs"' in served.get("/metrics").text
    assert len(answer["choices"]) == 4
    assert (card["variant"], card["client_chunk"]) == ("pairs", 1)
    assert max(step["num_rows"] for step in steps) == 2


def test_help_and_errors_list_it() -> None:
    parser = argparse.ArgumentParser()
    main.add_arguments(parser)
    assert "baseline, static, dynamic, continuous, pairs" in " ".join(parser.format_help().split())
    assert read_settings({"VARIANT": "Pairs"}, env_file=None).variant == "pairs"
    with pytest.raises(ConfigError, match="must be one of baseline, static, dynamic, continuous, pairs"):
        read_settings({"VARIANT": "pair"}, env_file=None)
