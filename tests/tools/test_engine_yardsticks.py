"""Engines in processes of their own, in turns."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest

from adapters.base import LabError
from tools import engine_yardsticks


def arguments(out: Path, **changes: object) -> Namespace:
    given = {"engines": ["null"], "model": "null", "dtype": "auto", "threads": 1, "rows": [2, 1]}
    return Namespace(**{**given, "requests": 3, "blocks": 2, "out": out, **changes})


def test_each_block_has_every_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_yardsticks.run(arguments(tmp_path)) == 0
    (path,) = tmp_path.glob("yardsticks/*.parquet")
    frame = pd.read_parquet(path)
    measures = ["decode step, 1 rows", "decode step, 2 rows", "prompt of 512", "3 requests, continuous"]
    assert frame["measure"].to_list() == measures * 2
    assert frame["block"].to_list() == [0] * 4 + [1] * 4
    assert (frame["seconds"] > 0).all()
    assert "decode step, 2 rows" in capsys.readouterr().out


def test_an_engine_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"llama_cpp: .*no-such-model"):
        engine_yardsticks.run(arguments(tmp_path, engines=["null", "llama_cpp"], model="./no-such-model"))
