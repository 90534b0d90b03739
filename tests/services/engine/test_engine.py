"""The step loop on a virtual clock: messages in, one report a step out, and what a failure takes with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import pytest

from adapters.base import (
    BackendConfig,
    BackendError,
    ConfigError,
    EngineFigure,
    SamplingParams,
    ScheduledChunk,
    Sequence,
    StepOutput,
)
from adapters.null_backend import NullBackend
from services.engine.engine import Engine
from services.engine.limits import SchedulerLimits
from services.engine.message_loop import Message, QueueInbox
from services.engine.messages import Cancel, Drain, SequenceUpdate, StepRecord, StepReport, Stop, Submit
from services.engine.scheduler import Scheduler
from services.strategies import VARIANTS
from services.strategies.base import StrategyConfig
from tests.services.virtual_time import Clock, ScriptedInbox

STEP_S = 0.1
MAX_BATCH = 4


class TimedBackend(NullBackend):
    """The null backend with a step of `STEP_S` on the virtual clock; fails when told to."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(BackendConfig(max_batch_size=MAX_BATCH, max_model_len=100))
        self._clock = clock
        self.failures: dict[int, Exception] = {}
        """By number of the call, from 1 on."""
        self.culprits: set[int] = set()
        """Sequences that no step can compute."""
        self.num_calls = 0
        self.released: list[int] = []

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        self.num_calls += 1
        self._clock.now_s += STEP_S
        if failure := self.failures.get(self.num_calls):
            raise failure
        if any(chunk.seq.seq_id in self.culprits for chunk in chunks):
            raise BackendError("it is not to be computed")
        return super().step(chunks)

    @property
    def num_free_slots(self) -> int:
        return MAX_BATCH - len(self._num_cached)

    def release(self, seq_ids: Seq[int]) -> None:
        self.released += seq_ids
        super().release(seq_ids)


class EngineLab:
    def __init__(
        self,
        variant: str = "continuous",
        *,
        tick_s: float = 0.0,
        pad_finished: bool = True,
        make_backend: Callable[[Clock], TimedBackend] = TimedBackend,
    ) -> None:
        self.clock = Clock()
        self.backend = make_backend(self.clock)
        info = self.backend.info
        limits = SchedulerLimits(
            info.kv_capacity_tokens, info.max_model_len, MAX_BATCH, prefill_chunk=8, pad_finished=pad_finished
        )
        strategy = VARIANTS[variant](StrategyConfig(MAX_BATCH, batch_wait_s=0.05))
        self.reports: list[tuple[float, StepReport]] = []
        self.publish_s = 0.0
        self.engine = Engine(
            self.backend,
            Scheduler(strategy, limits, info.eos_token_ids),
            publish=self.publish,
            clock=self.clock,
            tick_s=tick_s,
        )

    def publish(self, report: StepReport) -> None:
        self.reports.append((round(self.clock.now_s - 50.0, 6), report))
        self.clock.now_s += self.publish_s

    def run(self, *script: tuple[float, Message]) -> ScriptedInbox:
        inbox = ScriptedInbox(self.clock, script)
        self.engine.run(inbox)
        return inbox

    @property
    def records(self) -> list[StepRecord]:
        return [report.record for _, report in self.reports if report.record]

    def updates(self, seq_id: int) -> list[tuple[float, SequenceUpdate]]:
        return [(at_s, u) for at_s, report in self.reports for u in report.updates if u.seq_id == seq_id]


def request(seq_id: int, max_tokens: int, *, prompt: int = 4, at_s: float = 0.0) -> tuple[float, Submit]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    seq = Sequence(seq_id, [65] * prompt, params, group_id=seq_id, arrival_s=50.0 + at_s)
    return at_s, Submit([seq])


def test_one_report_a_step_carries_all_its_tokens() -> None:
    lab = EngineLab()
    lab.run(request(1, 3), request(2, 1))
    assert [at_s for at_s, _ in lab.reports] == [0.1, 0.2, 0.3]
    assert [[u.seq_id for u in report.updates] for _, report in lab.reports] == [[1, 2], [1], [1]]
    assert [len(u.token_ids) for _, u in lab.updates(1)] == [1, 1, 1]
    assert [u.finish_reason for _, u in lab.updates(1)] == [None, None, "length"]
    assert lab.backend.released == [2, 1]


def test_a_record_says_what_the_step_did() -> None:
    lab = EngineLab("static")
    pair = [request(1, 1)[1].sequences[0], request(2, 3, prompt=6)[1].sequences[0]]
    pair[1].group_id = 1
    lab.run((0.0, Submit(pair)), request(3, 1))
    fields = [
        (r.step, r.num_rows, r.num_prompt_tokens, r.num_decode_tokens, r.num_dead_rows, r.queue_depth)
        for r in lab.records
    ]
    assert fields == [(0, 2, 10, 0, 0, 1), (1, 1, 0, 1, 1, 1), (2, 1, 0, 1, 1, 1), (3, 1, 4, 0, 0, 0)]
    assert [r.start_s for r in lab.records] == pytest.approx([50.0, 50.1, 50.2, 50.3])
    assert [r.duration_s for r in lab.records] == pytest.approx([STEP_S] * 4)
    assert [(report.num_running, report.kv_used_tokens) for _, report in lab.reports] == [
        (1, 14),
        (1, 14),
        (0, 0),
        (0, 0),
    ]


def test_a_record_says_what_it_took_to_publish_the_step_before() -> None:
    lab = EngineLab()
    lab.publish_s = 0.01
    lab.run(request(1, 3))
    assert [r.publish_s for r in lab.records] == pytest.approx([0.0, 0.01, 0.01])
    assert [r.start_s for r in lab.records] == pytest.approx([50.0, 50.11, 50.22])


def test_timings_split_the_way_from_arrival_to_the_last_token() -> None:
    lab = EngineLab("baseline")
    lab.run(request(1, 2), request(2, 3, at_s=0.05))
    timings = lab.updates(2)[-1][1].timings
    assert timings is not None
    # In the first step until 0.1, held back by the strategy until 0.2, then 0.1 and 0.2 of work.
    assert (timings.queue_s, timings.batch_wait_s) == pytest.approx((0.05, 0.1))
    assert (timings.prefill_s, timings.decode_s) == pytest.approx((0.1, 0.2))


def test_nothing_is_computed_while_nothing_waits() -> None:
    lab = EngineLab()
    inbox = lab.run(request(1, 1, at_s=7.0))
    assert inbox.waits == [None, None]
    assert lab.backend.num_calls == 1
    assert lab.reports[0][0] == pytest.approx(7.1)


def test_the_loop_wakes_when_the_strategy_asked_to_be_asked_again() -> None:
    lab = EngineLab("dynamic")
    lab.run(request(1, 1), request(2, 1, at_s=0.02))
    assert [(record.num_rows, round(record.start_s - 50.0, 6)) for record in lab.records] == [(2, 0.05)]


def test_drain_ends_the_wait_for_company() -> None:
    lab = EngineLab("dynamic")
    lab.run(request(1, 1), (0.02, Drain()))
    assert lab.records[0].start_s == pytest.approx(50.02)


def test_tick_is_the_least_time_between_steps() -> None:
    lab = EngineLab(tick_s=0.25)
    lab.run(request(1, 3), request(2, 1, at_s=0.15))
    assert [record.start_s for record in lab.records] == pytest.approx([50.0, 50.25, 50.5])
    assert lab.updates(2)[0][0] == pytest.approx(0.35)


def test_a_cancel_frees_the_slot_before_the_next_step() -> None:
    lab = EngineLab()
    lab.run(request(1, 50), request(2, 4), (0.15, Cancel([1])))
    at_s, last = lab.updates(1)[-1]
    assert (at_s, last.token_ids, last.finish_reason) == (0.2, [], "abort")
    assert lab.backend.released == [1, 2]
    assert [record.num_rows for record in lab.records] == [2, 2, 1, 1]


def test_a_cancel_of_what_waits_is_reported_without_a_step() -> None:
    lab = EngineLab("dynamic")
    lab.run(request(1, 5), (0.01, Cancel([1], reason="stop")))
    assert [(at_s, u.finish_reason) for at_s, u in lab.updates(1)] == [(0.01, "stop")]
    assert lab.backend.num_calls == 0


def test_a_request_that_can_never_fit_is_answered_with_the_reason() -> None:
    lab = EngineLab()
    lab.run(request(1, 200), request(2, 1))
    ((_, refused),) = lab.updates(1)
    assert refused.finish_reason == "error"
    assert refused.error is not None
    assert "204 together; at most 100 fit" in refused.error
    assert lab.updates(2)[-1][1].finish_reason == "length"


def test_a_failed_step_is_tried_apart_and_ends_the_culprit_alone() -> None:
    lab = EngineLab()
    lab.backend.culprits = {2}
    lab.run(request(1, 5), request(2, 5), request(3, 2, at_s=0.15))
    update = lab.updates(2)[-1][1]
    assert (update.finish_reason, update.error) == ("error", "the backend failed: it is not to be computed")
    for seq_id, num_tokens in ((1, 5), (3, 2)):
        updates = [update for _, update in lab.updates(seq_id)]
        assert [len(u.token_ids) for u in updates] == [1] * num_tokens
        assert updates[-1].finish_reason == "length"
    assert sorted(lab.backend.released) == [1, 2, 3]
    assert [record.step for record in lab.records] == list(range(lab.backend.num_calls))
    assert [(r.num_rows, r.num_dead_rows) for r in lab.records[:3]] == [(0, 2), (1, 0), (1, 0)]


def test_what_is_tried_apart_gives_the_same_tokens() -> None:
    def answers(failures: dict[int, Exception]) -> list[list[int]]:
        lab = EngineLab("static")
        lab.backend.failures = failures
        pair = [request(1, 2)[1].sequences[0], request(2, 5, prompt=20)[1].sequences[0]]
        pair[1].group_id = 1
        lab.run((0.0, Submit(pair)))
        assert lab.backend.num_free_slots == MAX_BATCH
        return [[t for _, u in lab.updates(seq_id) for t in u.token_ids] for seq_id in (1, 2)]

    whole = answers({})
    assert [len(tokens) for tokens in whole] == [2, 5]
    for failing in range(1, 4):
        assert answers({failing: BackendError("once")}) == whole


def test_the_figures_of_a_backend_go_with_the_reports_of_steps() -> None:
    class Counting(TimedBackend):
        def figures(self) -> Mapping[EngineFigure, float]:
            return {"requests": self.num_calls}

    lab = EngineLab(make_backend=Counting)
    lab.run(request(1, 2), (0.15, Cancel([1])))
    assert [report.figures for _, report in lab.reports] == [{"requests": 1}, {"requests": 2}]
    plain = EngineLab()
    plain.run(request(1, 1))
    assert plain.reports[0][1].figures is None


def test_a_sequence_that_fails_apart_too_ends_with_its_own_reason() -> None:
    lab = EngineLab()
    lab.backend.failures = {2: BackendError("all"), 3: BackendError("first"), 4: BackendError("second")}
    lab.run(request(1, 5), request(2, 5))
    assert [lab.updates(n)[-1][1].error for n in (1, 2)] == [
        "the backend failed: first",
        "the backend failed: second",
    ]
    assert lab.backend.num_calls == 4


def test_work_on_messages_counts_as_a_step_does() -> None:
    lab = EngineLab()
    seen: list[float] = []

    def release(seq_ids: Seq[int]) -> None:
        lab.clock.now_s += 7.0
        seen.append(lab.engine.busy_s())

    lab.run(request(1, 9), (0.05, Stop()))
    lab.backend.release = release  # type: ignore[method-assign]
    lab.engine.handle([Cancel([1])])
    assert seen == [7.0]
    assert lab.engine.busy_s() == 0.0


def test_any_other_exception_leaves_the_loop() -> None:
    lab = EngineLab()
    lab.backend.failures[2] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        lab.run(request(1, 5))


def test_steps_go_on_under_a_flood_of_messages() -> None:
    lab = EngineLab()
    flood: list[tuple[float, Message]] = []
    for number in range(10):
        many = [request(1000 * (number + 1) + i, 1)[1].sequences[0] for i in range(300)]
        flood += [(0.05, Submit(many)), (0.05, Cancel([seq.seq_id for seq in many]))]
    lab.run(request(1, 20), *flood)
    steps_s = [at_s for at_s, _ in lab.updates(1)]
    assert len(steps_s) == 20
    ends = [at_s for at_s, report in lab.reports for u in report.updates if u.finish_reason == "abort"]
    assert len(ends) == 3000
    assert len(set(ends)) >= 5, "no turn takes them all"


def test_stop_leaves_after_the_current_step() -> None:
    lab = EngineLab()
    lab.run(request(1, 50), (0.15, Stop()))
    assert lab.backend.num_calls == 2


def test_a_batch_larger_than_the_backend_is_refused() -> None:
    backend = NullBackend(BackendConfig(max_batch_size=8))
    limits = SchedulerLimits(1000, 1000, max_batch=16)
    scheduler = Scheduler(VARIANTS["baseline"](StrategyConfig()), limits)
    with pytest.raises(ConfigError, match="MAX_BATCH is 16, but the backend has 8 slots"):
        Engine(backend, scheduler, publish=print)


def test_queue_inbox_hands_over_between_threads() -> None:
    inbox = QueueInbox()
    assert inbox.get(0) is None
    assert inbox.get(0.001) is None
    sender = threading.Thread(target=inbox.put, args=(Drain(),))
    sender.start()
    assert inbox.get(None) == Drain()
    sender.join()
    inbox.put(Stop())
    assert inbox.get(0) == Stop()


@pytest.mark.parametrize("pad_finished", [True, False])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_strategy_gives_the_same_tokens(variant: str, pad_finished: bool) -> None:
    def answers(variant: str) -> dict[int, list[int]]:
        lab = EngineLab(variant, pad_finished=pad_finished)
        submits = [request(seq_id, 3 + seq_id % 5, prompt=3 + 5 * seq_id) for seq_id in range(1, 9)]
        lab.run(*submits)
        return {seq_id: [t for _, u in lab.updates(seq_id) for t in u.token_ids] for seq_id in range(1, 9)}

    given = answers(variant)
    assert [len(tokens) for tokens in given.values()] == [3 + seq_id % 5 for seq_id in range(1, 9)]
    assert given == answers("baseline")
