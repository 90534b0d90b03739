"""What a step says of the positions it attends to, in its record."""

from __future__ import annotations

from tests.services.virtual_lab import VirtualLab


def test_rows_prompts_and_dead_rows_tell_their_contexts() -> None:
    lab = VirtualLab("static")
    lab.submit(1, 3, prompt=10)
    # Chunks of 8 positions, both prompts in one step: 1 + 2 + ... + 10 each.
    told = [lab.step().contexts() for _ in range(3)]
    names = ("num_prompt_chunks", "prompt_context_tokens", "decode_context_tokens")
    assert [tuple(each[name] for name in names) for each in told] == [(2, 110, 0), (0, 0, 21), (0, 0, 22)]
