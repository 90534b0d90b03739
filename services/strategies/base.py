"""The one question a batching strategy answers: how many sequences at the head of the queue join now?

A strategy does not pick, reorder, cancel or time anything, and it touches no clock: `now_s` is given.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Protocol

from adapters.base import BackendConfig, Sequence


@dataclass(slots=True)  # not frozen, which takes three times as long: steps make one
class Admission:
    """`count` sequences join; ask again at `recheck_at_s` even if nothing happens until then."""

    count: int
    recheck_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class StrategyConfig:
    """The settings a strategy may use. A field that is an `option` is a setting of the field's name."""

    max_batch: int = BackendConfig().max_batch_size
    batch_wait_s: float = 0.050


class BatchingStrategy(Protocol):
    """One policy. `admit` may ask for more than fits: the scheduler cuts at free slots and KV."""

    name: ClassVar[str]
    keeps_finished_rows: ClassVar[bool]
    """True where a finished row stays in the batch until the last one is done (if PAD_FINISHED)."""
    takes_groups: ClassVar[bool]
    """True where the client should send its prompts in chunks of the batch size, one request each."""
    admits_while_running: ClassVar[bool]
    """False where `admit` always answers 0, and no time to ask again, while something runs. A simulator may
    then pass over the question."""

    def __init__(self, config: StrategyConfig) -> None: ...

    def admit(
        self, waiting: Seq[Sequence], running: Seq[Sequence], *, now_s: float, draining: bool
    ) -> Admission:
        """Say how many of `waiting`, from its head on, join the batch.

        `running` holds every sequence that has a slot, dead rows included. With `draining` no
        further request will come, so waiting for a fuller batch is pointless.
        """
        ...
