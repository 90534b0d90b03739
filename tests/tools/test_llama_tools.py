"""`lab parity` and `lab step-cost`: that they run, and what must hold on any machine."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs the llama extra")
pytest.importorskip("torch", reason="needs the torch extra")

from tools import parity
from tools.profiling import step_cost

pytestmark = pytest.mark.llama


def test_torch_and_llama_cpp_agree_in_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parity.add_arguments(parser)
    arguments = ["--model=lab-26m", "--prompts=3", "--tokens=8", f"--artifacts-dir={tmp_path}"]
    assert parity.run(parser.parse_args(arguments)) == 0
    shown = capsys.readouterr().out
    assert "same greedy answer: 3 of 3 prompts" in shown
    assert "24 of 24 places" in shown
    assert float(shown.split("largest logit difference: ")[1].split()[0]) < 1e-2


def test_step_cost_times_both_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    step_cost.add_arguments(parser)
    arguments = ["--models", "lab-26m", "--rows", "1", "3", "--prompt=8", "--steps=3", "--blocks=2"]
    assert step_cost.run(parser.parse_args([*arguments, f"--artifacts-dir={tmp_path}"])) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "lab-26m" in line]
    assert [row[2].strip() for row in rows] == ["1", "3"]
    assert all(int(row[column].replace(",", "")) > 0 for row in rows for column in (3, 4))
