"""The messages between the API and the engine, through a pipe or a queue; all can be pickled.

API -> engine: `Submit`, `Cancel`, `Drain`, `Stop`. Engine -> API: `Ready`, one `StepReport` a step, `Beat`s
between them, `EngineFailed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.base import BackendInfo, EngineFigure, FinishReason, Sequence, TokenLogprobs
from services.contract.timings import SequenceTimings, StepRecord


@dataclass(frozen=True, slots=True)
class Submit:
    """All sequences of one request; they share `group_id` and join the queue together."""

    sequences: list[Sequence]

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, slots=True)
class Cancel:
    """End these sequences now, wherever they are; ids already finished are ignored."""

    seq_ids: list[int]
    reason: FinishReason = "abort"

    @property
    def num_sequences(self) -> int:
        return len(self.seq_ids)


@dataclass(frozen=True, slots=True)
class Drain:
    """No further request comes: strategies stop waiting for fuller batches."""

    num_sequences = 0


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop after the current step."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and the engine takes work."""

    info: BackendInfo


@dataclass(slots=True)  # not frozen, which takes three times as long: each row of each step makes one
class SequenceUpdate:
    """New tokens of one sequence and, on its last update, how it ended."""

    seq_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    timings: SequenceTimings | None = None
    error: str | None = None
    """Why, where `finish_reason` is "error"."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each token, where they were asked for."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step gave, and the state after it.

    `record` is None where no step was computed: for a sequence that was cancelled, say.
    """

    updates: list[SequenceUpdate] = field(default_factory=list)
    record: StepRecord | None = None
    num_running: int = 0
    queue_depth: int = 0
    kv_used_tokens: int = 0
    prefilling_seq_ids: list[int] = field(default_factory=list)
    """The running sequences that have no token yet."""
    figures: Mapping[EngineFigure, float] | None = None
    """What the engine says of itself after a step, if it does."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The engine's process lives. `busy_s`: how long its present step has run so far, 0 between steps."""

    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine cannot go on; the process that runs it ends after this."""

    message: str
