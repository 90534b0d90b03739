"""Who waits for whom: priorities, aging, room in slots and KV, and how the wait is booked."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest

from adapters.base import SamplingParams, Sequence
from services.engine.messages import SequenceTimings
from services.engine.waiting_queue import WaitingQueue
from services.orders.base import OrderConfig
from services.orders.fcfs import Fcfs
from services.strategies import VARIANTS
from services.strategies.base import Admission
from services.strategies.continuous import Continuous
from tests.services.virtual_lab import LIMITS, VirtualLab


class GroupsAnytime(Continuous):
    """Takes the whole queue at any time and asks for groups to stay whole."""

    takes_groups = True

    def admit(
        self, waiting: Seq[Sequence], running: Seq[Sequence], *, now_s: float, draining: bool
    ) -> Admission:
        return Admission(len(waiting))


def test_priority_goes_first_and_equals_in_order_of_arrival() -> None:
    lab = VirtualLab("baseline")
    for priority in (0, 1, 2, 0, 1, 2):
        lab.submit(1, priority=priority)
    lab.run()
    assert [live for live, _ in lab.batches] == [[2], [5], [1], [4], [0], [3]]


def test_a_cancel_leaves_the_order_of_the_others() -> None:
    lab = VirtualLab("baseline")
    first, *_ = [lab.submit(1, priority=priority)[0] for priority in (2, 1, 0)]
    lab.cancel(first)
    lab.submit(1, priority=1)
    lab.submit(1, priority=2)
    lab.run()
    assert [live for live, _ in lab.batches] == [[4], [1], [3], [2]]


def test_aging_lets_the_low_one_pass_what_came_two_levels_later() -> None:
    lab = VirtualLab("baseline", limits=replace(LIMITS, aging_s=4.0))
    (low,) = lab.submit(1, priority=0)
    for _ in range(30):
        lab.submit(1, priority=2)
        lab.submit(1, priority=2)
        lab.step()
    assert low.admitted_s is not None
    overtaking = [seq for seq in lab.sequences.values() if seq.admitted_s and seq.admitted_s < low.admitted_s]
    assert max(seq.arrival_s for seq in overtaking) < 2 * 4.0
    assert low.admitted_s == len(overtaking) + 1


def test_no_aging_time_means_no_priorities() -> None:
    lab = VirtualLab("baseline", limits=replace(LIMITS, aging_s=0.0))
    lab.submit(1, priority=0)
    lab.submit(1, priority=2)
    lab.run()
    assert [live for live, _ in lab.batches] == [[0], [1]]


def test_the_head_of_the_queue_waits_for_kv_and_nobody_slips_past() -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, kv_capacity_tokens=22))
    lab.submit(5, prompt=10)
    lab.submit(10, prompt=10)
    lab.submit(1, prompt=1)
    lab.run()
    assert [sorted(live) for live, _ in lab.batches][:6] == [[0]] * 5 + [[1, 2]]


def test_a_group_waits_until_all_of_it_fits() -> None:
    lab = VirtualLab(GroupsAnytime)
    lab.submit(3, 3)
    lab.step()
    lab.submit(1, 1, 1)
    lab.run()
    assert [live for live, _ in lab.batches] == [[0, 1], [0, 1], [0, 1], [2, 3, 4]]


def test_a_group_too_large_for_the_batch_is_cut_when_nothing_runs() -> None:
    lab = VirtualLab(GroupsAnytime)
    lab.submit(*[1] * 6)
    lab.run()
    assert [live for live, _ in lab.batches] == [[0, 1, 2, 3], [4, 5]]


# -- the account of time --------------------------------------------------------------------------


def timings_of(lab: VirtualLab, seq: Sequence) -> SequenceTimings:
    timings = lab.published[seq.seq_id][-1].timings
    assert timings is not None
    return timings


def test_waiting_for_company_is_batch_wait() -> None:
    lab = VirtualLab("dynamic", batch_wait_s=5.0)
    (first,) = lab.submit(3)
    lab.schedule()
    lab.now_s = 2.0
    (second,) = lab.submit(1)
    lab.run()
    assert timings_of(lab, first) == SequenceTimings(0.0, 5.0, 1.0, 2.0, 3, 4 / 3)
    assert timings_of(lab, second) == SequenceTimings(0.0, 3.0, 1.0, 0.0, 1, 2.0)


def test_waiting_for_a_slot_is_queue_time() -> None:
    lab = VirtualLab("continuous")
    lab.submit(4, 4, 4, 4)
    (late,) = lab.submit(1)
    lab.run()
    timings = timings_of(lab, late)
    assert (timings.queue_s, timings.batch_wait_s) == (4.0, 0.0)


def test_waiting_for_kv_is_queue_time() -> None:
    lab = VirtualLab("continuous", limits=replace(LIMITS, kv_capacity_tokens=20))
    lab.submit(4, prompt=10)
    (late,) = lab.submit(1, prompt=10)
    lab.run()
    assert (timings_of(lab, late).queue_s, timings_of(lab, late).batch_wait_s) == (4.0, 0.0)


def test_static_holds_back_those_who_would_have_had_a_slot() -> None:
    lab = VirtualLab("static")
    lab.submit(3, 3)
    lab.step()
    late = [lab.submit(1)[0] for _ in range(3)]
    lab.run()
    waits = [(timings_of(lab, seq).batch_wait_s, timings_of(lab, seq).queue_s) for seq in late]
    # Until second 3 two slots are free beside the pair; from then on one runs at a time beside three.
    assert waits == [(2.0, 0.0), (3.0, 0.0), (2.0, 2.0)]


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("strategy", sorted(VARIANTS))
def test_every_strategy_books_the_same_wait_alike(strategy: str, pads: bool) -> None:
    """A batch of two: its first answer ends at second 2, its second at 6. A third request comes at 0."""
    lab = VirtualLab(strategy, limits=replace(LIMITS, max_batch=2, pad_finished=pads), batch_wait_s=0.0)
    lab.submit(2, 6)
    lab.step()
    (late,) = lab.submit(1, at_s=0.0)
    lab.run()
    timings = timings_of(lab, late)
    account = (timings.queue_s, timings.batch_wait_s)
    # Until second 2 both slots compute answers. From then on one is free but for a strategy that holds back,
    # whether a dead row stands in it or nothing.
    expected = {
        "continuous": (2.0, 0.0),
        "static": (2.0, 4.0),
        "dynamic": (2.0, 4.0),
        # The second of the pair runs from 2 to 8. While it waits the free slot would be its own.
        "baseline": (2.0, 6.0),
    }[strategy]
    assert account == expected


def test_arriving_in_mid_step_is_queue_time() -> None:
    lab = VirtualLab("continuous", step_s=2.0)
    lab.submit(3)
    lab.step()
    (late,) = lab.submit(1, at_s=0.5)
    lab.run()
    assert timings_of(lab, late).queue_s == 1.5


def test_a_cancelled_sequence_accounts_for_its_wait_too() -> None:
    lab = VirtualLab("dynamic", batch_wait_s=5.0)
    (seq,) = lab.submit(3)
    lab.schedule()
    lab.now_s = 2.0
    lab.cancel(seq)
    lab.now_s = 9.0
    lab.schedule()
    assert timings_of(lab, seq) == SequenceTimings(0.0, 2.0, 0.0, 0.0, 0, 0.0)
    assert seq.batch_wait_s == 2.0


def test_those_that_leave_the_queue_leave_the_order_of_the_rest() -> None:
    def group(group_id: int, arrival_s: float, priority: int = 1) -> list[Sequence]:
        params = SamplingParams()
        return [
            Sequence(
                group_id * 10 + i, [1], params, priority=priority, group_id=group_id, arrival_s=arrival_s
            )
            for i in range(3)
        ]

    queue = WaitingQueue(Fcfs(OrderConfig(aging_s=10.0)))
    for waiting in (group(1, 0.0), group(2, 1.0), group(3, 2.0)):
        queue.push(waiting)
    assert [seq.seq_id for seq in queue.take({31, 10, 12, 99})] == [10, 12, 31]
    assert queue.take({10, 99}) == []
    queue.push(group(4, 2.0, priority=2))
    queue.push(group(5, 1.0))
    assert [seq.seq_id for seq in queue.sequences] == [40, 41, 42, 11, 20, 21, 22, 50, 51, 52, 30, 32]
