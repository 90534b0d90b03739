"""Capacities: the search, its stop, and intervals held against servers whose capacity is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from harness.commands import capacity
from harness.comparing.capacity import Capacities, find_capacities, search
from harness.replay.arm_file import Arm
from harness.selfcheck.capacity_trials import BUSY_S, covering, on_sockets
from tests.harness.commands.test_bench import _plain_environment  # noqa: F401
from tests.harness.comparing.test_recomputed import t_of
from tests.harness.fake_server import FakeServer, model_card, slowly
from tools.cli import main


@pytest.mark.parametrize("start", [0.3, 10.0, 400.0])
def test_a_search_stops_where_two_rates_are_as_close_as_said(start: float) -> None:
    tried: list[float] = []

    def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= 17.0

    found = search(holds, start, 2.0, 0.03)
    assert found == pytest.approx(17.0, rel=0.015)
    assert min(r for r in tried if r > 17) / max(r for r in tried if r <= 17) <= 1.03


@pytest.mark.parametrize("always", [True, False])
def test_a_search_without_an_end_says_so(always: bool) -> None:
    assert search(lambda rate: always, 1.0, 2.0, 0.03) is None
    found = Capacities({"a": [1.0, 1.0, None]}, "a", "", 0.03)
    assert found.capacity("a") is None
    assert "no end found" in found.table()


def test_limits_that_no_rate_meets_are_given_up_soon() -> None:
    tried: list[float] = []

    def never(rate: float) -> bool:
        tried.append(rate)
        return False

    assert search(never, 50.0, 2.0, 0.03) is None
    assert len(tried) == 9
    assert min(tried) > 0.1


def test_a_sharp_knee_is_found_within_5_percent() -> None:
    arms = [Arm(None, "a"), Arm(None, "b")]
    knees = {"a": 20.0, "b": 31.0}
    made = find_capacities(arms, 5, 1.0, 0.03, 3, lambda arm, block: lambda r: r <= knees[str(arm.name)])
    found = Capacities(made, "a", "", 0.03)
    for name, knee in knees.items():
        told = found.capacity(name)
        assert told is not None
        assert told.value == pytest.approx(knee, rel=0.01)
    # Blocks start elsewhere, so that the stop of the search is no error that all of them share.
    assert len(set(made["a"])) == 5


def test_intervals_are_students_over_blocks() -> None:
    logs = np.log([4.0, 5.0, 4.4])
    half = t_of(0.975, 2) * logs.std(ddof=1) / np.sqrt(3)
    found = Capacities({"a": [4.0, 5.0, 4.4], "b": [8.0, 10.0, 8.8]}, "a", "", 0.03)
    own, ratio = found.capacity("a"), found.ratio("b")
    assert own is not None
    assert ratio is not None
    assert own.interval == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)), rel=1e-4)
    # Paired: what both arms have in common is not in the ratio.
    assert ratio.interval == pytest.approx((2.0, 2.0))


def test_intervals_hold_the_truth() -> None:
    for name, error, covered in covering(200, 5, 3000, seed=9):
        assert abs(error) < 0.02, name
        assert 0.90 <= covered <= 0.99, name


def test_a_real_server_of_known_knee() -> None:
    """One small search. Beside other work it finds less, so the bound is not that of a quiet machine."""
    found = on_sockets(1, num_requests=120)
    assert found is not None
    assert 0.75 / BUSY_S < found.value < 1.06 / BUSY_S


def test_the_command_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--requests", "60", "--warmup", "0", "--from-rate", "300", "--closest", "50%", "--blocks", "1"]
    with FakeServer(slowly(0.002), card=model_card()) as server:
        assert main(["capacity", "--url", server.url, *words, "--slo", "ttft_p95_ms=200"]) == 0
    shown = capsys.readouterr().out
    match = re.search(r"\S+capacity/\S+\.parquet", shown)
    assert match is not None
    path = Path(match[0])
    facts = json.loads(path.with_suffix(".json").read_text())
    assert json.loads((pq.read_schema(path).metadata or {})[b"lab.capacity"]) == facts
    rows = pq.read_table(path).to_pylist()
    assert {"arm", "block", "rate", "met", "path"} <= set(rows[0])
    assert all(Path(row["path"]).is_file() for row in rows)


@pytest.mark.parametrize("probes_done", [0, 4])
def test_an_interrupted_search_writes_what_it_has(
    probes_done: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def probe(*args: Any) -> bool:
        if len(made) == probes_done:
            raise KeyboardInterrupt
        made.append(args)
        arm, block, rate, *_, tried = args
        tried.append({"arm": str(arm.name), "block": block, "rate": rate, "met": rate <= 5.0, "path": "x"})
        return bool(rate <= 5.0)

    monkeypatch.setattr(capacity, "_probe", probe)
    words = ["--url", "http://127.0.0.1:9", "--from-rate", "4", "--closest", "80%"]
    assert main(["capacity", *words, "--slo", "ttft_p95_ms=200"]) == 130
    shown = capsys.readouterr().out
    assert f"interrupted after {probes_done} runs" in shown
    match = re.search(r"\S+capacity/\S+\.parquet", shown)
    assert (match is None) == (probes_done == 0)
    if match is not None:
        assert "Interrupted: only searches that had ended count." in shown
        told = json.loads(Path(match[0]).with_suffix(".json").read_text())
        assert told["interrupted"] is True
        blocks = told["arms"]["server"]["blocks"]
        assert blocks
        assert all(rate == pytest.approx(5.0, rel=0.5) for rate in blocks)
        assert pq.read_table(match[0]).num_rows == probes_done


def test_a_capacity_needs_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "--url", "http://127.0.0.1:9"]) == 2
    assert "a capacity needs limits" in capsys.readouterr().err
