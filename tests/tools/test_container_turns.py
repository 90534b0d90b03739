"""Turns of two services, neither of them in a container; ratios whose answer is known."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.services.served import serving
from tools import container_turns


@contextmanager
def no_container(image: str, env: Mapping[str, str]) -> Iterator[str]:
    with serving() as served:
        yield f"http://127.0.0.1:{served.port}"


def test_both_get_the_same_in_a_balanced_order_and_a_second_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "turns.parquet"
    monkeypatch.setattr(container_turns, "container", no_container)
    for name, value in {"BACKEND": "null", "MODEL": "null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    for num_blocks in ("1", "2"):
        words = ["--requests", "8", "--concurrency", "4", "--blocks", num_blocks, "--out", str(path)]
        monkeypatch.setattr(sys, "argv", ["container_turns", *words])
        container_turns.main()
    frame = pd.read_parquet(path)
    inside, outside = container_turns.INSIDE, container_turns.OUTSIDE
    assert list(frame["where"]) == [inside, outside, outside, inside, outside, inside, inside, outside]
    assert (frame["num_equal"] == 8).all()
    assert frame.groupby("block")["num_tokens"].nunique().eq(1).all()
    out = capsys.readouterr().out
    assert "2 of 2 blocks; answers all equal" in out
    assert "tok per CPU s of the machine" in out


def test_a_drift_within_a_block_is_in_no_ratio() -> None:
    # Each turn takes a tenth longer than the one before; the container is a twentieth slower.
    rows = []
    for block in range(4):
        first = ["container", "outside"] if block % 2 == 0 else ["outside", "container"]
        for place, where in enumerate([*first, *reversed(first)]):
            rate = 100 / 1.1 ** (4 * block + place) * (0.95 if where == "container" else 1)
            rows.append({"block": block, "where": where, "tokens_per_s": rate, "tokens_per_cpu_s": rate})
    frame = pd.DataFrame(rows)
    assert np.exp(container_turns.log_ratios(frame, "tokens_per_s")) == pytest.approx([0.95] * 4)
    assert container_turns.turns_table(frame).count("0.950 [0.950-0.950]") == 2
