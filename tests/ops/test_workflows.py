"""The workflows as they are executed: by act, in a clone, with their own steps in order.

Marked `ops`: they need the packages of the group ops. A load of seconds stands for the real one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.plan.corpus import REPOSITORY
from tools.nightly.rehearsal import Stage, make_stage, verdict_of

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent


def test_every_step_is_a_make_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    steps = [step for path in WORKFLOWS for step in re.findall(r"\brun: (.*)", path.read_text())]
    assert len(steps) > 10
    assert {step.removeprefix("make ") for step in steps} <= targets


def test_actions_are_pinned_by_commit() -> None:
    uses = [use for path in WORKFLOWS for use in re.findall(r"uses: (.*)", path.read_text())]
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", use) for use in uses)


@pytest.mark.ops
def test_actionlint_and_zizmor_find_nothing() -> None:
    for words in (["actionlint"], ["zizmor", "--offline", "--quiet", ".github/workflows"]):
        made = subprocess.run(
            [str(BIN / words[0]), *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stdout + made.stderr


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return make_stage(tmp_path)


@pytest.mark.ops
@pytest.mark.timeout(900)
def test_the_nightly_turns_red_on_a_slower_step(stage: Stage) -> None:
    stage.commit(0.2)
    made = stage.run("schedule", "bench-nightly.yml")
    told = made.stdout + made.stderr
    assert made.returncode == 1, told
    assert verdict_of(stage) == "REGRESSION"
    steps = re.findall(r"in turns\] ⭐ Run Main (make \S+|[a-z, ]+)$", told, re.MULTILINE)
    assert steps == ["the history so far", "measure", "history, page, pictures and series"], told
    nightly = stage.artifacts / "nightly"
    assert (nightly / "index.html").stat().st_size > 500_000
    assert list((nightly / "pictures").glob("*.png"))
    assert list((stage.artifacts / "history").glob("date=*/commit=*/*.parquet"))
    assert "Summary - ### A regression" in told
    assert "issue create --title Nightly: A regression" in (stage.artifacts / "gh.log").read_text()
    assert "bench-history" in stage.git("ls-remote", "--heads", "origin")


@pytest.mark.ops
@pytest.mark.timeout(900)
def test_the_nightly_is_not_red_on_the_same_code(stage: Stage) -> None:
    stage.commit(0.0)
    made = stage.run("schedule", "bench-nightly.yml", env={"BUDGET_S": "60"})
    assert made.returncode == 0, made.stdout + made.stderr
    assert verdict_of(stage) in ("pass", "can't tell")


@pytest.mark.ops
@pytest.mark.timeout(900)
def test_a_pull_request_gets_a_comment(stage: Stage) -> None:
    base = stage.git("rev-parse", "HEAD")
    stage.commit(0.2)
    head = stage.git("rev-parse", "HEAD")
    facts = {"pull_request": {"number": 7, "base": {"sha": base}, "head": {"sha": head}}}
    made = stage.run("pull_request", "bench-pr.yml", facts)
    assert verdict_of(stage, "bench-pr") == "REGRESSION", made.stdout + made.stderr
    after = {"workflow_run": {"event": "pull_request", "id": 5, "head_sha": head}}
    said = stage.run("workflow_run", "bench-pr-comment.yml", after)
    assert said.returncode == 0, said.stdout + said.stderr
    log = (stage.artifacts / "gh.log").read_text()
    assert "--method POST repos/{owner}/{repo}/issues/7/comments" in log
    assert json.loads((stage.artifacts / "bench-pr" / "verdict.json").read_text())["old"] == base


@pytest.mark.ops
@pytest.mark.timeout(900)
def test_ci_runs_its_steps(stage: Stage) -> None:
    env = {"ARGS": "tests/harness/plan"}
    made = stage.run("push", "ci.yml", None, env, "--matrix", "python:3.11")
    told = made.stdout + made.stderr
    assert made.returncode == 0, told
    steps = re.findall(r"✅  Success - Main (make \S+)", told)
    assert sorted(steps) == ["make check", "make lock-check", "make test", "make workflow-check"]
