"""The workflows as they are executed: by act, in a clone, with their own steps in order.

A load of seconds stands for the real one. The planted slowdown is one that three blocks tell of on a busy
machine too; `python -m tools.nightly.rehearsal` has the proof for 20%.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.plan.corpus import REPOSITORY
from services.strategies import VARIANTS
from tools.nightly.rehearsal import Stage, make_stage, verdict_of

BIN = Path(sys.executable).parent
pytestmark = [
    pytest.mark.ops,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (BIN / "act").exists(), reason="THE WORKFLOWS WERE NOT EXECUTED: no act (`uv sync --group ops`)"
    ),
]

SLOWDOWN = 2.0
LOAD = {"REQUESTS": "16", "CONCURRENCY": "8"}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return make_stage(tmp_path)


def test_actionlint_and_zizmor_find_nothing() -> None:
    for words in (["actionlint"], ["zizmor", "--offline", "--quiet", ".github/workflows"]):
        made = subprocess.run(
            [str(BIN / words[0]), *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stdout + made.stderr


def test_the_nightly_turns_red_on_a_slower_step(stage: Stage) -> None:
    stage.commit(SLOWDOWN)
    made = stage.run("schedule", "bench-nightly.yml", env=LOAD)
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


def test_a_nightly_that_dies_leaves_an_issue(stage: Stage) -> None:
    """As with a failed installation or a time limit, there is no verdict."""
    made = stage.run("schedule", "bench-nightly.yml", env=LOAD | {"ARGS": "--no-such-option"})
    assert made.returncode == 1, made.stdout + made.stderr
    assert verdict_of(stage) == "none"
    log = (stage.artifacts / "gh.log").read_text()
    assert "issue create --title Nightly: A measurement failed --body The run ended without a verdict" in log


def test_a_pull_request_of_equal_code_gets_a_comment_and_is_not_red(stage: Stage) -> None:
    base = stage.git("rev-parse", "HEAD")
    stage.commit(0.0)
    head = stage.git("rev-parse", "HEAD")
    # What the event says of the base is that of the last push.
    facts = {"pull_request": {"number": 7, "base": {"sha": "0" * 40}, "head": {"sha": head}}}
    # Three blocks: a pass may need more, a regression is not to be seen in any.
    budget = ("--var", "BENCH_PR_BUDGET_S=1")
    made = stage.run("pull_request", "bench-pr.yml", facts, LOAD | {"BENCH_VARIANTS": ""}, *budget)
    assert made.returncode == 0, made.stdout + made.stderr
    words = verdict_of(stage, "bench-pr").split(", ")
    assert len(words) == len(VARIANTS)
    assert {*words} <= {"pass", "can't tell"}
    fork = {"head_repository": {"owner": {"login": "someone"}}, "head_branch": "faster"}
    after = {"workflow_run": {"event": "pull_request", "id": 5, "head_sha": head, **fork}}
    said = stage.run("workflow_run", "bench-pr-comment.yml", after)
    assert said.returncode == 0, said.stdout + said.stderr
    log = (stage.artifacts / "gh.log").read_text()
    assert "-f head=someone:faster" in log
    assert "--method POST repos/{owner}/{repo}/issues/7/comments" in log
    assert json.loads((stage.artifacts / "bench-pr" / "verdict.json").read_text())["old"] == base


def test_ci_runs_its_steps(stage: Stage) -> None:
    # What mypy knows of this tree holds for the clone: it compares files by their content.
    env = {"ARGS": "tests/harness/plan", "MYPY_CACHE_DIR": str(REPOSITORY / ".mypy_cache")}
    made = stage.run("push", "ci.yml", None, env, "--matrix", "python:3.11")
    told = made.stdout + made.stderr
    assert made.returncode == 0, told
    steps = re.findall(r"✅  Success - Main (make \S+)", told)
    assert sorted(steps) == ["make check", "make lock-check", "make test", "make workflow-check"]
