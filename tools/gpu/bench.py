"""The rows of one `gpu_bench` run and the time that is left for more.

A part that fails is noted and costs only itself; the file is written again after every part.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tools.result_file import write_rows


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work each part does."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    context: int = 256
    steps: int = 40
    prefill: tuple[int, ...] = (512, 2048)
    concurrency: tuple[int, ...] = (1, 16, 64, 256)
    lengths: tuple[int, int] = (100, 1024)
    copy_bytes: int = 4 << 30
    matrix: int = 8192
    answers: int = 8
    answer_tokens: int = 32
    foreign: int = 64
    """Requests for transformers' own continuous batching."""
    invariant_rows: tuple[int, ...] = (1, 16, 64, 256)
    max_step_tokens: int = 2048


QUICK = Sizes(
    rows=(1, 4),
    context=16,
    steps=3,
    prefill=(32,),
    concurrency=(1, 2),
    lengths=(4, 12),
    copy_bytes=16 << 20,
    matrix=256,
    answers=2,
    answer_tokens=6,
    foreign=0,
    invariant_rows=(1, 4),
    max_step_tokens=256,
)


@dataclass
class Bench:
    """The rows so far, and the time that is left."""

    device: str
    dtype: str
    sizes: Sizes
    seed: int
    budget_s: float
    path: Path
    artifacts_dir: str = "artifacts"
    started_s: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.started_s)

    def add(self, part: str, model: str, name: str, **figures: Any) -> None:
        self.rows.append({"part": part, "model": model, "name": name, **figures})

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def fits(self, what: str, needs_s: float) -> bool:
        """False, and noted, where `what` takes longer than is left."""
        if needs_s <= self.left_s:
            return True
        self.note(f"skipped: {what} (about {needs_s:.0f} s, {max(self.left_s, 0):.0f} s left)")
        return False

    def run(self, what: str, part: Callable[[], None], needs_s: float = 1.0) -> None:
        """One part, its failure noted; the file is written with what it brought."""
        if not self.fits(what, needs_s):
            return
        self.say(f"{what} ... ({self.left_s:.0f} s left)")
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            self.note(f"FAILED: {what}: {type(error).__name__}: {error}")
        write_rows(pd.DataFrame(self.rows), self.path, {**self.facts, "notes": self.notes})
