"""Logs of real runs go through the scheduler again: it plans the steps that they have, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from harness.plan.corpus import REPOSITORY
from harness.results.manifest import RunManifest
from harness.results.steps import STEPS_SUFFIX
from harness.simulator import replaying
from harness.simulator.measured import read_run
from harness.simulator.overheads import Overheads
from harness.simulator.replaying import NEAR_S, StepReplay, num_unlike, replay_steps
from tests.harness.simulator.as_measured import measured
from tools.cli import main

LOGS = Path(__file__).parent / "logs"
RUNS = sorted(path for path in LOGS.glob("*.parquet") if not path.name.endswith(STEPS_SUFFIX))
Run = tuple[RunManifest, pd.DataFrame, pd.DataFrame]


def replayed(run: Run) -> StepReplay:
    replay = replay_steps(*run)
    assert replay is not None
    return replay


@pytest.fixture
def idle_between() -> Run:
    """Requests that come one by one, to an engine that is often idle."""
    return read_run(LOGS / "continuous-open.parquet")


def joining_step(run: Run) -> int:
    """The place of a step that a request began by itself, on an idle engine."""
    _, _, steps = run
    idle_s = steps["start_s"] - (steps["start_s"] + steps["duration_s"]).shift()
    return int(idle_s.argmax())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_at_most_one_step_in_a_hundred_differs_and_each_has_a_reason(path: Path) -> None:
    replay = replayed(read_run(path))
    assert replay.num_steps > 500
    assert replay.num_differing <= 0.01 * replay.num_steps
    assert replay.unexplained is None
    assert not replay.is_off


def test_a_request_on_the_other_side_of_a_start_is_named(
    idle_between: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "fit_overheads", lambda *_: Overheads(accept_s=0.0008))
    replay = replayed(idle_between)
    assert replay.text() == "3 of 1,647 differ, by arrival order"
    assert [difference.reason for difference in replay.differences[:2]] == [
        "request 7 came 0.41 ms before its start by the estimate and was not in it",
        "request 8 came 0.25 ms before its start by the estimate and was not in it",
    ]
    unlike = num_unlike(*idle_between)
    assert unlike is not None
    assert unlike > 100, "each would be one token behind until it ends"
    monkeypatch.setattr(replaying, "fit_overheads", lambda *_: Overheads(accept_s=0.1))
    assert replayed(idle_between).is_off, "this is not a matter of a few ms"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_another_batch_size_is_seen(path: Path) -> None:
    manifest, rows, steps = read_run(path)
    assert manifest.service is not None
    manifest.service.settings["max_batch"] = 1
    replay = replayed((manifest, rows, steps))
    assert replay.is_off
    assert replay.text().endswith("!")


def test_another_policy_is_seen() -> None:
    manifest, rows, steps = read_run(LOGS / "static.parquet")
    assert manifest.service is not None
    manifest.service.settings["pad_finished"] = False
    assert replayed((manifest, rows, steps)).is_off


def test_a_count_that_is_wrong_is_one_step(idle_between: Run) -> None:
    manifest, rows, steps = idle_between
    steps.loc[700, "num_rows"] += 1
    found = replayed((manifest, rows, steps)).unexplained
    assert found is not None
    assert (found.step, found.num_steps) == (steps.loc[700, "step"], 1)


def test_a_step_that_began_before_its_request_came_is_seen(idle_between: Run) -> None:
    manifest, rows, steps = idle_between
    shifted = joining_step(idle_between)
    steps.loc[shifted, "start_s"] -= 4 * NEAR_S
    found = replayed((manifest, rows, steps)).unexplained
    assert found is not None
    assert found.step == steps.loc[shifted, "step"]


def test_a_missing_step_is_seen_and_so_is_one_too_many(idle_between: Run) -> None:
    manifest, rows, steps = idle_between
    place = joining_step(idle_between)
    assert replayed((manifest, rows, steps.drop(index=place))).is_off
    in_idle_time = steps.loc[[place]].assign(start_s=steps.loc[place, "start_s"] - 4 * NEAR_S)
    in_idle_time["duration_s"] = 0.001
    found = replayed((manifest, rows, pd.concat([steps, in_idle_time]))).unexplained
    assert found is not None
    assert found.num_steps == 1


def test_answers_that_the_log_does_not_end_are_seen(idle_between: Run) -> None:
    manifest, rows, steps = idle_between
    found = replayed((manifest, rows, steps[:-1])).unexplained
    assert found is not None
    assert found.step == steps["step"].iloc[-1]


def test_rows_without_the_instants_of_the_service_are_not_replayed(tmp_path: Path) -> None:
    assert replay_steps(*read_run(measured(tmp_path, "continuous"))) is None


def test_the_table_of_errors_says_how_many_steps_differ(capsys: pytest.CaptureFixture[str]) -> None:
    calibrated, *others = map(str, RUNS)
    main(["simulate", "--calibrate", calibrated, "--verify", *others])
    told = re.findall(r"\|\s+(\d+ of [\d,]+ differ)(?:, by arrival order)? \|", capsys.readouterr().out)
    assert len(told) == len(others)
    assert "0 of 1,289 differ" in told


@pytest.mark.parametrize(
    "path",
    sorted([*LOGS.glob("*.parquet"), *(REPOSITORY / "docs/measured").rglob("*.parquet")]),
    ids=lambda path: path.name,
)
def test_a_committed_file_names_no_place_of_the_machine(path: Path) -> None:
    assert not re.findall(rb"(?<![\w.])/[a-z_]{3,}/", path.read_bytes()), "absolute paths"
