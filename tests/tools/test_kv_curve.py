"""The table of `lab kv-curve`, from a few prompts."""

from __future__ import annotations

import pytest

from tools.cli import main


def test_less_memory_holds_more_sequences_with_paged(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--requests", "30", "--capacities", "32768", "1024", "--watermarks", "0", "0.3", "--repeats", "1"]
    assert main(["kv-curve", *args]) == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:8]]
    assert [line[:2] for line in lines] == [
        [capacity, policy]
        for capacity in ("32768", "1024")
        for policy in ("reserve", "paged, 0", "paged, 0.3")
    ]
    ample, scarce = lines[:3], lines[3:]
    assert {tuple(line[2:]) for line in ample} == {tuple(ample[0][2:])}, "without pressure they are the same"
    assert float(scarce[1][3]) > 1.2
    assert int(scarce[0][6]) == 0 < int(scarce[1][6])
    assert int(scarce[2][6]) < int(scarce[1][6]), "the watermark saves preemptions"
    assert "the host's whole work" in out
