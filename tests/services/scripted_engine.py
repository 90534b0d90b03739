"""An engine client for tests that says what it is told to say, when it is told to."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from adapters.base import BackendInfo, Sequence
from adapters.null_backend import NullBackend
from services.contract.timings import SequenceTimings, StepRecord
from services.engine.message_loop import Message
from services.engine.messages import Cancel, SequenceUpdate, StepReport, Submit
from services.engine.spec import EngineSpec
from services.engine_client.client import OnLost, OnReport

TIMINGS = SequenceTimings(0.25, 0.5, 0.001, 0.002, 3, 1.0)


@dataclass
class ScriptedEngine:
    """Call it as a `MakeClient`; it then is the client. `start_s` and `step_s` place its steps in time."""

    messages: list[Message] = field(default_factory=list)
    start_s: float = 0.0
    step_s: float = 0.5
    num_steps: int = 0

    def __call__(self, spec: EngineSpec, on_report: OnReport, on_lost: OnLost) -> ScriptedEngine:
        self._info = NullBackend(spec.backend).info
        self.on_report = on_report
        self.on_lost = on_lost
        return self

    async def start(self) -> BackendInfo:
        return self._info

    def send(self, message: Message) -> None:
        self.messages.append(message)

    async def close(self) -> None:
        self.messages.clear()

    @property
    def submitted(self) -> list[Sequence]:
        return [seq for message in self.messages if isinstance(message, Submit) for seq in message.sequences]

    @property
    def cancelled(self) -> list[int]:
        return [i for message in self.messages if isinstance(message, Cancel) for i in message.seq_ids]

    def step(self, *updates: SequenceUpdate, num_running: int = 0, prefilling_seq_ids: Seq[int] = ()) -> None:
        """Report one step."""
        begin_s = self.start_s + self.num_steps * self.step_s
        record = StepRecord(self.num_steps, begin_s, self.step_s, len(updates), 5, 1, 2, 0)
        self.num_steps += 1
        self.on_report(StepReport(list(updates), record, num_running, 0, 64, list(prefilling_seq_ids)))


def last(seq_id: int, token_ids: list[int]) -> SequenceUpdate:
    """The update that ends a sequence."""
    return SequenceUpdate(seq_id, token_ids, "length", TIMINGS)
