"""An engine over a launching backend on a virtual clock, with what it told kept for the tests."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.base import SamplingParams, Sequence
from services.engine.engine import Engine
from services.engine.limits import SchedulerLimits
from services.engine.message_loop import Message
from services.engine.messages import SequenceUpdate, StepRecord, StepReport, Submit
from services.engine.policies import Policies
from services.engine.scheduler import Scheduler
from services.strategies import VARIANTS
from services.strategies.base import StrategyConfig
from tests.services.launching_backend import EOS, LaunchingBackend
from tests.services.virtual_time import Clock, ScriptedInbox

LIMITS = SchedulerLimits(10_000, 1000, max_batch=4, max_step_tokens=64, prefill_chunk=8)


class _PatientInbox(ScriptedInbox):
    def __init__(self, backend: LaunchingBackend, script: list[tuple[float, Message]]) -> None:
        super().__init__(backend.clock, script)
        self._backend = backend

    def get(self, timeout_s: float | None) -> Message | None:
        assert timeout_s == 0 or not self._backend.in_flight, "nobody waits while a step is in flight"
        return super().get(timeout_s)


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    reason: str | None


class OverlapLab:
    def __init__(
        self,
        variant: str = "continuous",
        *,
        limits: SchedulerLimits = LIMITS,
        overlap: bool = True,
        tick_s: float = 0.0,
        eos_one_in: int = 12,
        launch_s: float = 0.0,
        policies: Policies = Policies(),  # noqa: B008 frozen
    ) -> None:
        self.clock = Clock()
        self.backend = LaunchingBackend(
            self.clock, limits.max_batch, eos_one_in=eos_one_in, launch_s=launch_s
        )
        strategy = VARIANTS[variant](StrategyConfig(limits.max_batch, batch_wait_s=0.25))
        self.scheduler = Scheduler(strategy, limits, [EOS], policies)
        self.sequences: list[Sequence] = []
        self.reports: list[tuple[float, StepReport]] = []
        self.engine = Engine(
            self.backend,
            self.scheduler,
            publish=self._hear,
            clock=self.clock,
            tick_s=tick_s,
            overlap=overlap,
        )

    def run(self, *script: tuple[float, Message]) -> None:
        for _, message in script:
            if isinstance(message, Submit):
                self.sequences += message.sequences
        self.engine.run(_PatientInbox(self.backend, sorted(script, key=lambda entry: entry[0])))
        self.backend.close()

    def updates(self, seq_id: int) -> list[tuple[float, SequenceUpdate]]:
        return [(at_s, u) for at_s, report in self.reports for u in report.updates if u.seq_id == seq_id]

    def answer(self, seq_id: int) -> Answer:
        updates = [update for _, update in self.updates(seq_id)]
        assert [u.finish_reason for u in updates[:-1]] == [None] * (len(updates) - 1)
        token_ids = [token_id for update in updates for token_id in update.token_ids]
        return Answer(token_ids, updates[-1].finish_reason if updates else None)

    @property
    def records(self) -> list[StepRecord]:
        return [report.record for _, report in self.reports if report.record]

    def _hear(self, report: StepReport) -> None:
        assert len(report.prefilling_seq_ids) <= report.num_running
        self.reports.append((round(self.clock.now_s - 50.0, 6), report))


def sequence(
    seq_id: int, max_tokens: int, *, prompt: int = 4, at_s: float = 0.0, params: SamplingParams | None = None
) -> Sequence:
    params = params or SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompt_ids = [1 + (seq_id * 7 + position) % 90 for position in range(prompt)]
    return Sequence(seq_id, prompt_ids, params, group_id=seq_id, arrival_s=50.0 + at_s)


def request(
    seq_id: int,
    max_tokens: int,
    *,
    prompt: int = 4,
    at_s: float = 0.0,
    params: SamplingParams | None = None,
) -> tuple[float, Submit]:
    return at_s, Submit([sequence(seq_id, max_tokens, prompt=prompt, at_s=at_s, params=params)])
