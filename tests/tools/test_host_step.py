"""`lab host-step`: that it runs the real engine and launcher, and leaves nothing patched behind."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("torch", reason="needs the torch extra")

from adapters.torch_backend.cuda import steps
from adapters.torch_backend.cuda.sampling import sample_rows
from services.engine.engine import Engine
from tools.profiling import host_step


def test_every_part_of_a_step_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    host_step.add_arguments(parser)
    step = Engine.step
    assert host_step.run(parser.parse_args(["--rows", "1", "3", "--steps", "12", "--repeats", "1"])) == 0
    assert Engine.step is step
    assert vars(steps)["sample_rows"] is sample_rows
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, *lines = [[cell.strip() for cell in line] for line in table]
    assert head[1:3] == ["greedy, 1", "greedy, 3"]
    assert "top_k, top_p, 3" in head
    times = {name: [float(cell) for cell in cells] for name, *cells in lines}
    assert {part for _, _, part in host_step._PARTS} < set(times)
    assert min(times["upload"] + times["whole step"] + times["API process"]) > 0
