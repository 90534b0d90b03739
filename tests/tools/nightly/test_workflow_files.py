"""What can be read off the workflows; tests/ops executes them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.plan.corpus import REPOSITORY
from services.strategies import VARIANTS
from tools.nightly import github, history_branch, measure

# Of this process nothing else: a make that runs the tests hands its variables on.
OUTSIDE = {name: os.environ[name] for name in ("PATH", "HOME")}
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def test_every_step_is_a_make_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    steps = [step for path in WORKFLOWS for step in re.findall(r"\brun: (.*)", path.read_text())]
    assert len(steps) > 10
    assert {step.removeprefix("make ") for step in steps} <= targets


def test_actions_are_pinned_by_commit() -> None:
    uses = [use for path in WORKFLOWS for use in re.findall(r"uses: (.*)", path.read_text())]
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", use) for use in uses)


def steps_of(name: str) -> dict[str, dict[str, str]]:
    """Of each make target that a workflow calls, the environment that it sets."""
    jobs: dict[str, Any] = yaml.safe_load((REPOSITORY / ".github" / "workflows" / name).read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"] if "run" in step]
    return {step["run"].removeprefix("make "): step.get("env", {}) for step in steps}


def told_by_make(target: str, env: dict[str, str]) -> list[list[str]]:
    """The words that this target gives to programs of tools/nightly, with nothing else set than `env`."""
    # A default of an expression is what it gives where a variable of the repository is not set.
    own = {name: re.sub(r"\$\{\{.*?(?:'(.*)')? \}\}", r"\1", value) for name, value in env.items()}
    words = ["make", "--no-print-directory", "-n", target]
    made = subprocess.run(
        words, cwd=REPOSITORY, env=OUTSIDE | own, capture_output=True, text=True, check=True
    )
    lines = [line for line in made.stdout.replace("\\\n", " ").splitlines() if " -m tools.nightly." in line]
    return [shlex.split(line)[2:] for line in lines]


@pytest.mark.parametrize(
    ("workflow", "target", "budget_s", "against"),
    [("bench-nightly.yml", "nightly", 5400.0, None), ("bench-pr.yml", "bench-pr", 2400.0, "HEAD^1")],
)
def test_the_workflows_measure_every_strategy_under_both_backends(
    workflow: str, target: str, budget_s: float, against: str | None
) -> None:
    env = steps_of(workflow)[target]
    (words,) = told_by_make(target, env)
    assert words[0] == measure.__name__
    args = measure.make_parser().parse_args(words[1:])
    assert args.variants == [*VARIANTS]
    assert args.backends == ["torch", "llama_cpp"]
    assert (args.budget_s, args.against, args.max_regression) == (budget_s, against, 0.05)
    (words,) = told_by_make(target, env | {"BENCH_VARIANTS": "static", "BENCH_BACKENDS": "null"})
    args = measure.make_parser().parse_args(words[1:])
    assert (args.variants, args.backends) == (["static"], ["null"])


@pytest.mark.parametrize(
    ("workflow", "target"),
    [
        ("bench-nightly.yml", "history-pull"),
        ("bench-nightly.yml", "history-push"),
        ("bench-nightly.yml", "nightly-issue"),
        ("bench-pr-comment.yml", "pr-comment"),
    ],
)
def test_programs_take_the_words_that_the_workflows_give_them(workflow: str, target: str) -> None:
    (words,) = told_by_make(target, steps_of(workflow)[target])
    program = {module.__name__: module for module in (github, history_branch)}[words[0]]
    program.make_parser().parse_args(words[1:])


def test_backends_that_are_asked_for_are_installed() -> None:
    words = ["make", "-n", "-W", "uv.lock", "nightly"]
    for backends, extras in (("torch llama_cpp", {"torch", "llama"}), ("null", set()), ("onnx", {"onnx"})):
        env = OUTSIDE | {"BENCH_BACKENDS": backends}
        made = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True)
        assert {*re.findall(r"--no-dev --extra (\w+)", made.stdout)} == extras


def test_history_is_not_green_where_nothing_was_measured(tmp_path: Path) -> None:
    words = ["make", "-f", str(REPOSITORY / "Makefile"), "-o", ".venv/.lab-base", "history"]
    made = subprocess.run(words, cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert "nothing was measured" in made.stdout
    # The status of `lab history`: 3 where a file was damaged, 2 where nothing worked.
    results = tmp_path / "nightly" / "results" / "compare"
    results.mkdir(parents=True)
    (results / "a.parquet").touch()
    lab = tmp_path / ".venv" / "bin" / "lab"
    lab.parent.mkdir(parents=True)
    for status, ended in ((3, 0), (2, 2)):
        lab.write_text(f"#!/bin/sh\nexit {status}\n")
        lab.chmod(0o755)
        made = subprocess.run(words, cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True, check=False)
        assert made.returncode == ended


def test_no_two_jobs_fill_one_cache() -> None:
    """The first job to end would keep its packages for all: a cache is never written again."""
    keys = [key for path in WORKFLOWS for key in re.findall(r"^ +key: (.*)", path.read_text(), re.MULTILINE)]
    assert len(keys) >= 3
    filled = [key.replace("${{ matrix.python }}", "3.12") for key in keys]
    assert len({*filled}) == len(filled)


def test_a_nightly_that_died_has_a_job() -> None:
    text = (REPOSITORY / ".github" / "workflows" / "bench-nightly.yml").read_text()
    job = yaml.safe_load(text)["jobs"]["regression"]
    assert "needs.measure.result != 'success'" in job["if"]
    assert "--run-failed" in job["steps"][-1]["env"]["ARGS"]
