"""`lab plan`: the fewest replicas that meet limits, and what it prints and draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.simulator.planning import Candidate, Probe, search
from tools.cli import main


@pytest.mark.parametrize("fewest", [1, 2, 3, 5, 8, 9, 20, 21])
def test_it_finds_the_fewest_and_tries_few(fewest: int) -> None:
    candidate = Candidate("continuous", "random")
    search(candidate, lambda number: Probe(number, number >= fewest, 0.0, {}), 20)
    found = candidate.fewest
    assert (found.num_replicas if found else None) == (fewest if fewest <= 20 else None)
    assert len(candidate.probes) <= 10


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in (("NULL_STEP_MS", "8"), ("NULL_ROW_MS", "0.5"), ("NULL_PROMPT_TOKEN_MS", "0.02")):
        monkeypatch.setenv(name, value)
    load = ["--calibrate", "null", "--rate", "20", "--requests", "120", "--out", str(tmp_path)]
    return ["plan", *load, "--routers", "round_robin", "--max-batch", "8", "--variants", "continuous"]


def test_more_load_or_tighter_limits_cost_more(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = []
    for slo in ("ttft_p95_ms=2000", "ttft_p95_ms=60,tpot_p95_ms=11"):
        chart = tmp_path / "frontier.svg"
        command = [*asked, "--slo", slo, "--price-per-hour", "1.5", "--chart", str(chart)]
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert "SIMULATED, not measured" in printed
        assert "are at risk" in printed
        prices.append(float(printed.partition(" USD an hour;")[0].split()[-1]))
        assert "continuous MAX_BATCH=8" in chart.read_text().replace("\u00a0", " ")
    assert prices[0] < prices[1]


def test_what_no_number_of_replicas_meets_is_said(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked, "--slo", "tpot_p95_ms=1", "--most-replicas", "4"]) == 1
    assert "Nothing that was tried meets tpot_p95_ms=1 with up to 4 replicas." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "a plan needs limits"),
        (["--slo", "itl_p99_ms=5"], "needs every token's stamp"),
        (["--slo", "ttft_ms=5", "--autoscale", "target=4"], "leave out --autoscale"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(
    asked: list[str], more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked, *more]) == 2
    assert told in capsys.readouterr().err
