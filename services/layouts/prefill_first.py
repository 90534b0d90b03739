"""Prefill first: while there are prompts a step carries them alone, and decoding waits.

First tokens come early. The next tokens of everybody else wait for whole prompts, and under a steady stream
of arrivals for many of them in a row.

Source: vLLM's first scheduler (v0), called prefill-prioritizing in Sarathi-Serve (Agrawal et al., arXiv
2403.02310).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from adapters.base import ScheduledChunk, Sequence
from services.layouts.base import StepBudget, whole_prompts_within


class PrefillFirst:
    name: ClassVar[str] = "prefill_first"
    rows_wait: ClassVar[bool] = True

    def prompt_chunks(self, prompts: Seq[Sequence], budget: StepBudget) -> list[ScheduledChunk]:
        return whole_prompts_within(prompts, budget)
