"""What a step says of the positions it attends to, in its record."""

from __future__ import annotations

from adapters.base import SamplingParams, ScheduledChunk, Sequence
from services.engine.step_plan import contexts
from tests.services.virtual_lab import VirtualLab


def test_rows_prompts_and_dead_rows_tell_their_contexts() -> None:
    lab = VirtualLab("static")
    lab.submit(1, 3, prompt=10)
    # Chunks of 8 positions, both prompts in one step: 1 + 2 + ... + 10 each.
    told = [contexts(lab.step().chunks) for _ in range(3)]
    names = ("num_prompt_chunks", "prompt_context_tokens", "decode_context_tokens")
    assert [tuple(each[name] for name in names) for each in told] == [(2, 110, 0), (0, 0, 21), (0, 0, 22)]


def test_tokens_that_are_computed_again_count_as_a_prompt() -> None:
    seq = Sequence(1, [1] * 20, SamplingParams(max_tokens=40), output_token_ids=[2] * 30)
    seq.num_prefill_tokens = 50  # it was preempted
    told = contexts([ScheduledChunk(seq, 32, 18)])
    assert told == {
        "num_prompt_chunks": 1, "decode_context_tokens": 0,
        "prompt_context_tokens": 18 * 32 + 18 * 19 // 2,
    }  # fmt: skip
