"""Prompts one at a time on the backend that has no weights: what is found, and the fit."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from tools import prefix_ttft


def test_each_arm_finds_its_share_and_no_token_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"BACKEND": "null", "MODEL": "null"}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "rows.parquet"
    words = ["--tokens", "128", "--prompts", "2", "--turns", "3", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["prefix_ttft", *words])
    prefix_ttft.main()
    frame = pd.read_parquet(path)
    assert len(frame) == 15
    assert frame.groupby("arm")["hit_share"].unique().map(list).to_dict() == {
        "no cache": [0.0],
        "0%": [0.0],
        "25%": [0.25],
        "50%": [0.5],
        "75%": [0.75],
    }
    assert (frame["num_equal"] == 2).all()
    out = capsys.readouterr().out
    assert "fit of the arms with a cache" in out
    assert out.count("x [") == 4


def test_the_fit_finds_what_is_fixed() -> None:
    shares = [0.0, 0.25, 0.5, 0.75]
    assert prefix_ttft.affine_fit(shares, [5 + (1 - share) * 100 for share in shares]) == pytest.approx(
        (5, 100)
    )
