"""Arms in turns on the backend that has no weights; ratios whose answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from adapters.base import LabError
from tools import policy_turns

NULL = ["--requests", "12", "--synthetic", "64+32x8"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str, **settings: str) -> None:
    for name, value in {"BACKEND": "null", "MODEL": "null", **settings}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["policy_turns", *words])
    policy_turns.main()


def test_memory_pressure_and_hits_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["continuous", "continuous@KV_POLICY=paged", "continuous@KV_POLICY=paged,PREFIX_CACHE=1"]
    path = tmp_path / "rows.parquet"
    run(monkeypatch, *arms, *NULL, "--turns", "3", "--out", str(path), KV_CAPACITY_TOKENS="224")
    frame = pd.read_parquet(path).set_index(["arm", "turn"])
    assert len(frame) == 9
    assert (frame["num_equal"] == 12).all()
    assert (frame["num_tokens"] == 96).all()
    reserve, paged, cached = (frame.loc[(arm, 0)] for arm in arms)
    assert (reserve["max_running"], reserve["num_preempted"], reserve["recomputed_share"]) == (2, 0, 0.0)
    assert (paged["num_preempted"] > 0) == (paged["recomputed_share"] > 0)
    assert reserve["hit_share"] == paged["hit_share"] == 0 < cached["hit_share"]
    assert cached["mean_running_full"] > reserve["mean_running_full"]
    out = capsys.readouterr().out
    assert "12 prompts" in out
    assert out.count("x [") == 2 * len(policy_turns.TIMES)
    assert "dead rows" not in out, "no arm has any"


def test_a_prompt_that_can_never_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match="at most 64 fit"):
        run(monkeypatch, "continuous", *NULL, "--turns", "1", KV_CAPACITY_TOKENS="64")


def test_ratios_are_paired_by_turn_and_know_the_place() -> None:
    # The machine doubles its speed from turn to turn; the arm is always a tenth slower.
    rows = [
        {"arm": arm, "turn": turn, "place": (turn + index) % 2, "cpu_s": 2.0**turn * (1.1 if index else 1.0)}
        for turn in range(6)
        for index, arm in enumerate(["first", "other"])
    ]
    texts = policy_turns.ratio_texts(pd.DataFrame(rows), ["first", "other"], "cpu_s")
    assert texts == {"first": "", "other": " (1.100x [1.100-1.100])"}


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (("continuous", "continuous@PREFILL_CHUNK=64"), "the arms share one backend"),
        (("continuous", "continuous"), "is named twice"),
        (("continuous@BACKEND=vllm,SCHEDULING=engine",), "takes no turns here"),
    ],
)
def test_arms_that_one_backend_cannot_play_are_refused(
    arms: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *arms, *NULL)
    assert words in capsys.readouterr().err
