"""The steps of a simulated replica: each of them, or, where millions would fill the memory, their sums."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

from harness.simulator.costs import StepWork
from services.contract.timings import StepRecord
from services.engine.step_plan import StepPlan


class StepLog(Protocol):
    def add(self, record: StepRecord) -> None:
        """A step; its number is the log's to give."""
        ...

    def add_step(self, plan: StepPlan, work: StepWork, depth: int, start_s: float, end_s: float) -> None: ...

    def add_run(self, live: int, dead: int, depth: int, context: int, instants_s: Seq[float]) -> None:
        """Decode steps in a row, start and end of each. `context` is the first one's, to which each adds
        `live`.
        """
        ...


class StepRecords(list[StepRecord]):
    def add(self, record: StepRecord) -> None:
        self.append(replace(record, step=len(self)))

    def add_step(self, plan: StepPlan, work: StepWork, depth: int, start_s: float, end_s: float) -> None:
        self.append(
            StepRecord(
                len(self), start_s, end_s - start_s, plan.num_rows, work.prompt_tokens,
                plan.num_decode_tokens, plan.num_dead_rows, depth, work.prompt_chunks, work.decode_context,
                work.prompt_context, plan.num_preempted,
            )
        )  # fmt: skip

    def add_run(self, live: int, dead: int, depth: int, context: int, instants_s: Seq[float]) -> None:
        number = len(self)
        self += [
            StepRecord(
                number + i, start_s, end_s - start_s, live, 0, live, dead, depth, 0, context + i * live, 0
            )
            for i, (start_s, end_s) in enumerate(zip(instants_s[::2], instants_s[1::2], strict=True))
        ]


class StepTotals:
    """Of any number of replicas together."""

    def __init__(self) -> None:
        self.num_steps = self.num_live = self.num_dead = 0

    @property
    def mean_batch_size(self) -> float:
        return self.num_live / max(1, self.num_steps)

    @property
    def dead_row_share(self) -> float:
        return self.num_dead / max(1, self.num_live + self.num_dead)

    def add(self, record: StepRecord) -> None:
        self.num_steps += 1
        self.num_live += record.num_rows
        self.num_dead += record.num_dead_rows

    def add_step(self, plan: StepPlan, work: StepWork, depth: int, start_s: float, end_s: float) -> None:
        self.num_steps += 1
        self.num_live += plan.num_rows
        self.num_dead += plan.num_dead_rows

    def add_run(self, live: int, dead: int, depth: int, context: int, instants_s: Seq[float]) -> None:
        num_steps = len(instants_s) // 2
        self.num_steps += num_steps
        self.num_live += num_steps * live
        self.num_dead += num_steps * dead
