"""What one step carries under each layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.base import SamplingParams, Sequence
from services.engine.policies import Policies
from services.layouts.base import StepBudget
from tests.services.virtual_lab import LIMITS, VirtualLab


def prompts(*lengths: int) -> list[Sequence]:
    return [Sequence(seq_id, [1] * length, SamplingParams()) for seq_id, length in enumerate(lengths)]


def carried(name: str, lengths: list[int], room: int, long_prompt_tokens: int = 0) -> list[tuple[int, int]]:
    layout = Policies(step_layout=name).make_layout()
    chunks = layout.prompt_chunks(prompts(*lengths), StepBudget(room, 8, long_prompt_tokens))
    return [(chunk.seq.seq_id, chunk.num_tokens) for chunk in chunks]


@pytest.mark.parametrize("name", ["prefill_first", "whole_prompts"])
def test_prompts_stay_whole_and_none_overtakes(name: str) -> None:
    assert carried(name, [20, 30, 5], room=60) == [(0, 20), (1, 30), (2, 5)]
    assert carried(name, [20, 30, 5], room=50) == [(0, 20), (1, 30)]
    assert carried(name, [20, 35, 5], room=50) == [(0, 20)]
    # It could never join whole, so it is cut, at a multiple of 8.
    assert carried(name, [45, 7], room=30) == [(0, 24)]


def test_decode_first_cuts_prompts_and_lets_short_ones_pass() -> None:
    assert carried("decode_first", [45, 5], room=30) == [(1, 5), (0, 24)]
    assert carried("decode_first", [45, 5], room=60, long_prompt_tokens=40) == [(1, 5), (0, 8)]


def steps_of(layout: str) -> list[tuple[int, int]]:
    """The decode and the prompt tokens of each step: one answers when a long prompt comes."""
    lab = VirtualLab(
        "continuous", limits=replace(LIMITS, max_step_tokens=32), policies=Policies(step_layout=layout)
    )
    lab.submit(6, prompt=3)
    lab.step()
    lab.submit(1, prompt=31)
    plans = [lab.step() for _ in range(4)]
    lab.run()
    return [(plan.num_decode_tokens, plan.num_prompt_tokens) for plan in plans]


def test_who_waits_for_a_prompt() -> None:
    assert steps_of("decode_first") == [(1, 31), (1, 0), (1, 0), (1, 0)]
    assert steps_of("whole_prompts") == [(1, 31), (1, 0), (1, 0), (1, 0)]
    assert steps_of("prefill_first") == [(0, 31), (1, 0), (1, 0), (1, 0)]
