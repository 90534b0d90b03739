"""The steps of a simulated replica: each of them, or, where millions would fill the memory, their sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

from harness.results.manifest import StepSummary
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
    def __init__(self) -> None:
        self.num_steps = self.num_live = self.num_dead = 0
        self.busy_s = 0.0
        self.durations: Counter[int] = Counter()
        """Number of steps by their duration in steps of 10 us; a run counts with its mean."""

    def add(self, record: StepRecord) -> None:
        self._count(record.num_rows, record.num_dead_rows, 1, record.duration_s)

    def add_step(self, plan: StepPlan, work: StepWork, depth: int, start_s: float, end_s: float) -> None:
        self._count(plan.num_rows, plan.num_dead_rows, 1, end_s - start_s)

    def add_run(self, live: int, dead: int, depth: int, context: int, instants_s: Seq[float]) -> None:
        self._count(live, dead, len(instants_s) // 2, sum(instants_s[1::2]) - sum(instants_s[::2]))

    def _count(self, live: int, dead: int, num_steps: int, busy_s: float) -> None:
        self.num_steps += num_steps
        self.num_live += num_steps * live
        self.num_dead += num_steps * dead
        self.busy_s += busy_s
        self.durations[round(busy_s / num_steps * 1e5)] += num_steps


def summarise_totals(each: Iterable[StepLog]) -> StepSummary | None:
    """As `summarise_steps`, of all that are sums; None where no step was computed."""
    logs = [log for log in each if isinstance(log, StepTotals)]
    num_steps = sum(log.num_steps for log in logs)
    if not num_steps:
        return None
    num_live, num_dead = sum(log.num_live for log in logs), sum(log.num_dead for log in logs)
    durations = sum((log.durations for log in logs), Counter[int]())
    passed = 0
    for bin_10us in sorted(durations):
        passed += durations[bin_10us]
        if 2 * passed >= num_steps:
            break
    return StepSummary(
        num_steps=num_steps,
        mean_batch_size=num_live / num_steps,
        dead_row_share=num_dead / max(1, num_live + num_dead),
        median_step_ms=bin_10us / 100,
        busy_s=sum(log.busy_s for log in logs),
        num_dropped=0,
    )
