"""Gated: slots are refilled only when at least half of them are free.

Fewer steps carry prompts, so the next tokens of those that run come more evenly, and new requests wait
longer for their first one. The gate opens when enough sequences have ended, never because time has passed.

Source: refilling in bursts, as with `waiting_served_ratio` of Hugging Face's text-generation-inference.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar

from adapters.base import Sequence


class Gated:
    name: ClassVar[str] = "gated"

    def most(self, waiting: Seq[Sequence], num_running: int, max_batch: int) -> int:
        return max_batch if num_running * 2 <= max_batch else 0
