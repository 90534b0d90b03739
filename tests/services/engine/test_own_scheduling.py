"""The loop around an engine that schedules itself, on a virtual clock: what it hands over and tells."""

from __future__ import annotations

import pytest

from adapters.base import BackendConfig, BackendInfo, SamplingParams, Sequence
from services.engine.limits import SchedulerLimits
from services.engine.message_loop import QueueInbox
from services.engine.messages import Cancel, Drain, SequenceUpdate, StepReport, Stop, Submit
from services.engine.own_scheduling import OwnSchedulingLoop
from services.engine.spec import EngineSpec, load_engine
from tests.services.toy_scheduling import BREAKS, REFUSED, ToyScheduling


class Lab:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.engine = ToyScheduling(BackendConfig())
        self.told: list[StepReport] = []
        limits = SchedulerLimits(128, 64, max_batch=2)
        self.loop = OwnSchedulingLoop(self.engine, limits, self.told.append, self.clock)

    def clock(self) -> float:
        self.now_s += 0.5
        return self.now_s

    def submit(self, *sequences: Sequence) -> None:
        self.loop.handle([Submit(list(sequences))])

    def run(self) -> None:
        while self.loop.step() is not None:
            pass

    def updates(self, seq_id: int) -> list[SequenceUpdate]:
        return [update for report in self.told for update in report.updates if update.seq_id == seq_id]

    def tokens(self, seq_id: int) -> list[int]:
        return [token_id for update in self.updates(seq_id) for token_id in update.token_ids]


def sequence(seq_id: int, max_tokens: int = 4, first: int = 40, **params: object) -> Sequence:
    return Sequence(seq_id, [first, first + 1, first + 2], SamplingParams(max_tokens, **params))  # type: ignore[arg-type]


def test_sequences_are_answered_and_each_step_is_told() -> None:
    lab = Lab()
    lab.submit(sequence(1), sequence(2), sequence(3, 2))
    lab.run()
    assert lab.tokens(1) == lab.tokens(2) == [43, 44, 45, 46]
    assert lab.tokens(3) == [43, 44]
    records = [report.record for report in lab.told if report.record]
    assert [(r.step, r.num_rows, r.num_prompt_tokens, r.num_decode_tokens) for r in records] == [
        (0, 2, 6, 0),
        (1, 2, 0, 2),
        (2, 2, 0, 2),
        (3, 2, 0, 2),
        (4, 1, 3, 0),
        (5, 1, 0, 1),
    ]
    assert (records[0].queue_depth, records[4].queue_depth) == (1, 0)
    assert [r.publish_s for r in records] == [0.0, *[0.5] * 5]
    assert (records[1].decode_context_tokens, records[0].prompt_context_tokens) == (8, 12)
    assert (lab.told[0].num_running, lab.told[0].queue_depth, lab.told[0].kv_used_tokens) == (2, 1, 8)
    assert lab.engine.released == [1, 2, 3]


def test_timings_come_from_the_steps() -> None:
    lab = Lab()
    lab.submit(sequence(1, 3))
    lab.run()
    last = lab.updates(1)[-1]
    assert last.finish_reason == "length"
    timings = last.timings
    assert timings is not None
    assert (timings.queue_s, timings.batch_wait_s, timings.num_steps, timings.mean_batch_size) == (
        1.0,
        0,
        3,
        1,
    )
    assert (timings.prefill_s, timings.decode_s) == (0.5, 4.0)


@pytest.mark.parametrize(
    ("params", "tokens", "reason"),
    [
        ({"stop_token_ids": (44,)}, [43, 44], "stop"),
        ({"first": 252}, [255, 256], "stop"),
        ({"max_tokens": 1}, [43], "length"),
    ],
)
def test_what_ends_an_answer(params: dict[str, int], tokens: list[int], reason: str) -> None:
    lab = Lab()
    lab.submit(sequence(1, **params))
    lab.run()
    assert lab.tokens(1) == tokens
    assert lab.updates(1)[-1].finish_reason == reason


def test_cancelled_ones_leave_wherever_they_are() -> None:
    lab = Lab()
    lab.submit(sequence(1, 9), sequence(2, 9), sequence(3, 9))
    lab.loop.step()
    lab.loop.handle([Cancel([1, 3, 77]), Drain()])
    assert [update.finish_reason for update in lab.told[-1].updates] == ["abort", "abort"]
    assert (lab.told[-1].num_running, lab.told[-1].queue_depth) == (1, 0)
    lab.run()
    assert lab.tokens(2) == list(range(43, 52))
    assert len(lab.tokens(1)) == 1


def test_a_request_that_is_refused_is_a_sentence_and_nothing_of_it_stays() -> None:
    lab = Lab()
    lab.submit(sequence(1), sequence(2, first=REFUSED))
    assert [(u.finish_reason, u.error) for u in lab.told[0].updates] == [("error", "the toy refuses it")] * 2
    lab.submit(sequence(3, 100))
    (update,) = lab.told[1].updates
    assert "at most 64 fit" in str(update.error)
    assert not lab.engine.has_work


def test_a_preempted_sequence_waits_and_its_output_is_prompt_then() -> None:
    lab = Lab()
    lab.submit(sequence(1))
    lab.loop.step()
    lab.engine.preempts = True
    lab.run()
    records = [report.record for report in lab.told if report.record]
    assert len(records) == len(lab.told)  # of a step that computed nothing there is nothing to tell
    assert lab.tokens(1) == [43, 44, 45, 46]
    assert records[1].num_prompt_tokens + records[1].num_decode_tokens == 1


def test_one_that_is_preempted_for_the_next_step_still_had_its_row_in_this_one() -> None:
    lab = Lab()
    lab.submit(sequence(1), sequence(2))
    lab.loop.step()
    lab.engine.preempts_late = True
    lab.loop.step()
    record = lab.told[-1].record
    assert record is not None
    assert (record.num_prompt_tokens, record.num_decode_tokens, record.num_preempted) == (0, 2, 1)
    used = lab.told[-1].kv_used_tokens
    lab.submit(sequence(3, first=REFUSED))
    told = lab.told[-1]
    assert (told.record, told.num_running, told.queue_depth, told.kv_used_tokens) == (None, 1, 1, used)
    assert used > 0
    lab.run()
    assert lab.tokens(1) == lab.tokens(2) == [43, 44, 45, 46]


def test_an_answer_that_the_engine_ends_too_early_is_an_error() -> None:
    lab = Lab()
    lab.engine.ends_early = True
    lab.submit(sequence(1))
    lab.run()
    last = lab.updates(1)[-1]
    assert (last.finish_reason, last.error) == ("error", "the engine ended this sequence too early")


def test_it_serves_an_inbox_until_it_is_told_to_stop_and_leaves_what_breaks() -> None:
    lab, inbox = Lab(), QueueInbox()
    inbox.put(Submit([sequence(1)]))
    inbox.put(Stop())
    lab.loop.run(inbox)
    assert lab.loop.busy_s() == 0
    inbox.put(Submit([sequence(2, first=BREAKS)]))
    with pytest.raises(RuntimeError, match="the toy broke"):
        lab.loop.run(inbox)
    assert lab.loop.busy_s() > 0


def test_a_spec_says_whose_scheduling_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.registry import BACKENDS
    from tests.services.toy_scheduling import DESCRIPTION

    monkeypatch.setitem(BACKENDS, "toy", DESCRIPTION)
    spec = EngineSpec("continuous", BackendConfig(backend="toy", max_batch_size=2), scheduling="engine")
    with load_engine(spec, lambda report: None) as (engine, info):
        assert isinstance(engine, OwnSchedulingLoop)
        assert isinstance(info, BackendInfo)
