"""Whole prompts: a step carries every decode row, and beside them prompts in one piece.

Every step gives every decoding sequence a token, but a step with a long prompt is as long as that prompt.

Source: iteration-level scheduling with selective batching, Yu et al., "Orca" (OSDI 2022).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from adapters.base import ScheduledChunk, Sequence
from services.layouts.base import StepBudget, whole_prompts_within


class WholePrompts:
    name: ClassVar[str] = "whole_prompts"
    rows_wait: ClassVar[bool] = False

    def prompt_chunks(self, prompts: Seq[Sequence], budget: StepBudget) -> list[ScheduledChunk]:
        return whole_prompts_within(prompts, budget)
