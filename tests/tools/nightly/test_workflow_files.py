"""What can be read off the workflows; tests/ops executes them."""

from __future__ import annotations

import re

from harness.plan.corpus import REPOSITORY

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
