"""What crosses the line between the API and the engine, whether that is a pipe or a queue.

API -> engine: `Submit`, `Cancel`, `Drain`, `Stop`. Engine -> API: `Ready`, one `StepReport` a step, `Beat`s
between them, `EngineFailed`. Plain picklable dataclasses; the lines themselves are in
`services.engine_client.thread`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters.base import BackendInfo, FinishReason, Sequence
from services.contract.timings import SequenceTimings, StepRecord


@dataclass(frozen=True, slots=True)
class Submit:
    """All sequences of one request; they share `group_id` and join the queue together."""

    sequences: list[Sequence]


@dataclass(frozen=True, slots=True)
class Cancel:
    """End these sequences now, wherever they are; ids already finished are ignored."""

    seq_ids: list[int]
    reason: FinishReason = "abort"


@dataclass(frozen=True, slots=True)
class Drain:
    """No more will be submitted: strategies stop waiting for fuller batches."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop after the current step."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and the engine takes work."""

    info: BackendInfo


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """New tokens of one sequence and, on its last update, how it ended."""

    seq_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    timings: SequenceTimings | None = None
    error: str | None = None
    """Why, where `finish_reason` is "error"."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """Everything that one turn of the loop has to tell. `record` is None when nothing was computed
    (a cancelled sequence that was still waiting, say)."""

    updates: list[SequenceUpdate] = field(default_factory=list)
    record: StepRecord | None = None
    num_running: int = 0
    queue_depth: int = 0
    kv_used_tokens: int = 0
    prefilling_seq_ids: list[int] = field(default_factory=list)
    """Of the running ones, those that have no token yet."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The engine's process lives. `busy_s`: how long its present step has run so far, 0 between steps."""

    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine cannot go on; the process that runs it ends after this."""

    message: str
