"""Overlapped or not, every sequence gets the same tokens; no slot is handed out twice and nobody is lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.base import SamplingParams, Sequence
from services.engine.limits import SchedulerLimits
from services.engine.message_loop import Message
from services.engine.messages import Cancel, Drain, Submit
from services.engine.policies import Policies
from services.kv_policies import KV_POLICIES
from services.layouts import LAYOUTS
from services.orders import ORDERS
from services.strategies import VARIANTS
from tests.services.launching_backend import GARBAGE
from tests.services.overlap_lab import LIMITS, OverlapLab, sequence

MAX_PROMPT, MAX_TOKENS = 30, 12


@dataclass(frozen=True)
class Request:
    at_s: float
    prompt: int
    budgets: list[int]
    priority: int
    ignore_eos: bool
    penalty: float
    exclusive: bool
    cancelled_at_s: float | None


@dataclass(frozen=True)
class Workload:
    variant: str
    limits: SchedulerLimits
    requests: list[Request]
    tick_s: float
    drains_at_s: float | None
    launch_s: float
    policies: Policies

    def script(self, *, cancels: bool) -> list[tuple[float, Message]]:
        script: list[tuple[float, Message]] = []
        num_sequences = 0
        for group_id, request in enumerate(self.requests):
            group: list[Sequence] = []
            for budget in request.budgets:
                params = SamplingParams(
                    budget, ignore_eos=request.ignore_eos, seed=group_id, repetition_penalty=request.penalty
                )
                group.append(
                    sequence(num_sequences, budget, prompt=request.prompt, at_s=request.at_s, params=params)
                )
                num_sequences += 1
            for seq in group:
                seq.group_id, seq.priority, seq.exclusive = group_id, request.priority, request.exclusive
            script.append((request.at_s, Submit(group)))
            if cancels and request.cancelled_at_s is not None:
                half = [seq.seq_id for seq in group[::2]]
                script.append((request.at_s + request.cancelled_at_s, Cancel(half)))
        if self.drains_at_s is not None:
            script.append((self.drains_at_s, Drain()))
        return script

    def run(
        self,
        *,
        overlap: bool,
        cancels: bool = True,
        fails_in_launch: frozenset[int] = frozenset(),
        fails_in_result: frozenset[int] = frozenset(),
    ) -> OverlapLab:
        lab = OverlapLab(
            self.variant,
            limits=self.limits,
            overlap=overlap,
            tick_s=self.tick_s,
            launch_s=self.launch_s if overlap else 0.0,
            policies=self.policies,
        )
        lab.backend.fails_in_launch |= fails_in_launch
        lab.backend.fails_in_result |= fails_in_result
        lab.run(*self.script(cancels=cancels))
        return lab

    @property
    def seq_ids(self) -> range:
        return range(sum(len(request.budgets) for request in self.requests))


# Steps take 0.1 s, so that all of these moments fall before, between and after some.
MOMENTS = st.integers(0, 40).map(lambda twentieths: twentieths / 20)
REQUESTS = st.builds(
    Request,
    at_s=MOMENTS,
    prompt=st.integers(1, MAX_PROMPT),
    budgets=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=6),
    priority=st.integers(0, 2),
    ignore_eos=st.sampled_from([False, False, True]),
    penalty=st.sampled_from([1.0] * 6 + [1.2]),
    exclusive=st.sampled_from([False] * 6 + [True]),
    cancelled_at_s=st.none() | MOMENTS,
)
WORKLOADS = st.builds(
    Workload,
    variant=st.sampled_from(sorted(VARIANTS)),
    limits=st.builds(
        lambda max_batch, chunk, spare, pad, slots_of_kv, threshold: replace(
            LIMITS,
            # From room for two slots, of which each holds the longest sequence.
            kv_capacity_tokens=(MAX_PROMPT + MAX_TOKENS) * 2 * slots_of_kv,
            max_batch=max_batch,
            prefill_chunk=chunk,
            max_step_tokens=max_batch + chunk + spare,
            pad_finished=pad,
            long_prefill_token_threshold=threshold,
            aging_s=1.0,
        ),
        st.integers(1, 5),
        st.sampled_from([1, 4, 16]),
        st.integers(0, 30),
        st.booleans(),
        st.integers(1, 3),
        st.sampled_from([0, 5, 20]),
    ),
    requests=st.lists(REQUESTS, min_size=1, max_size=8),
    tick_s=st.sampled_from([0.0, 0.0, 0.0, 0.05, 0.25]),
    drains_at_s=st.none() | MOMENTS,
    launch_s=st.sampled_from([0.0, 0.0, 0.03, 0.2]),
    policies=st.builds(
        Policies,
        order=st.sampled_from(sorted(ORDERS)),
        step_layout=st.sampled_from(sorted(LAYOUTS)),
        kv_policy=st.sampled_from(sorted(KV_POLICIES)),
        kv_watermark=st.sampled_from([0.0, 0.1]),
    )
    | st.builds(Policies, kv_policy=st.just("paged"), priority_preemption=st.just(True)),
)


def assert_nothing_is_left(lab: OverlapLab) -> None:
    scheduler = lab.scheduler
    assert (scheduler.queue_depth, scheduler.num_running, scheduler.kv_used_tokens) == (0, 0, 0)
    assert scheduler.prefilling_seq_ids() == []
    assert lab.backend.num_slots_in_use == 0
    released = [seq_id for what, seq_id in lab.backend.log if what == "release"]
    num_preempted = sum(record.num_preempted for record in lab.records)
    num_never_back = len(set(released)) + num_preempted - len(released)
    num_cut = sum(seq.finish_reason in ("abort", "error") for seq in lab.sequences)
    assert 0 <= num_never_back <= num_cut + sum(seq.finish_reason == "stop" for seq in lab.sequences)
    assert lab.engine.busy_s() == 0.0
    assert not any(seq.num_pending_tokens for seq in lab.sequences)


def assert_company_is_kept(workload: Workload, lab: OverlapLab) -> None:
    """An exclusive sequence shares no step, nor does any in the baseline; rows in vain included."""
    exclusive = {seq.seq_id for seq in lab.sequences if seq.exclusive}
    for rows in lab.backend.rows:
        if workload.variant == "baseline" or any(seq_id in exclusive for seq_id, _ in rows):
            assert len(rows) == 1


def assert_records_add_up(lab: OverlapLab) -> None:
    """Steps follow one another, and the live rows are those that the sequences count."""
    records = lab.records
    assert [record.step for record in records] == list(range(len(records)))
    for one, other in pairwise(records):
        assert one.start_s + one.duration_s <= other.start_s + 1e-9
    assert all(r.duration_s >= 0 and r.num_rows >= 0 and r.num_decode_tokens >= 0 for r in records)
    ends = [u for _, report in lab.reports for u in report.updates if u.timings]
    assert sum(record.num_rows for record in records) >= sum(u.timings.num_steps for u in ends if u.timings)
    assert [r.num_rows + r.num_dead_rows for r in records] == [len(rows) for rows in lab.backend.rows]
    for update in ends:
        assert update.timings is not None
        t = update.timings
        assert min(t.queue_s, t.batch_wait_s, t.prefill_s, t.decode_s) >= -1e-9


@given(WORKLOADS)
@settings(max_examples=250, deadline=None)
def test_overlap_changes_no_answer(workload: Workload) -> None:
    truth = workload.run(overlap=False, cancels=False)
    lab = workload.run(overlap=True)
    assert lab.backend.max_in_flight <= 2
    assert_nothing_is_left(lab)
    assert_records_add_up(lab)
    assert_company_is_kept(workload, lab)
    for seq_id in workload.seq_ids:
        answer, whole = lab.answer(seq_id), truth.answer(seq_id)
        assert whole.reason in ("stop", "length", "error")
        if answer.reason == "abort":
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        else:
            assert answer == whole
    if not any(request.cancelled_at_s is not None for request in workload.requests):
        assert all(lab.answer(seq_id).reason != "abort" for seq_id in workload.seq_ids)


@given(
    WORKLOADS, st.frozensets(st.integers(0, 25), max_size=3), st.frozensets(st.integers(0, 25), max_size=3)
)
@settings(max_examples=250, deadline=None)
def test_failures_end_their_own_sequences_and_lose_nobody(
    workload: Workload, fails_in_launch: frozenset[int], fails_in_result: frozenset[int]
) -> None:
    truth = workload.run(overlap=False, cancels=False)
    lab = workload.run(overlap=True, fails_in_launch=fails_in_launch, fails_in_result=fails_in_result)
    assert_nothing_is_left(lab)
    assert_records_add_up(lab)
    touched = {
        seq_id
        for step in fails_in_launch | fails_in_result
        if step < len(lab.backend.rows)
        for seq_id, is_dead in lab.backend.rows[step]
        if not is_dead
    }
    for seq_id in workload.seq_ids:
        answer, whole = lab.answer(seq_id), truth.answer(seq_id)
        assert GARBAGE not in answer.token_ids
        if answer.reason in ("abort", "error"):
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
            assert answer.reason == "abort" or whole.reason == "error" or seq_id in touched
        else:
            assert answer == whole


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@given(WORKLOADS)
@settings(max_examples=40, deadline=None)
def test_where_no_end_comes_early_overlap_plans_the_same_steps(variant: str, workload: Workload) -> None:
    """All at once, no end-of-sequence, no cancel: the scheduler knows all that it needs to know. But the time
    of a step that is planned ahead: no order that looks at the clock."""
    requests = [
        replace(request, at_s=0.0, ignore_eos=True, cancelled_at_s=None) for request in workload.requests
    ]
    policies = workload.policies
    if policies.order == "hrrn":
        policies = replace(policies, order="fcfs")
    workload = replace(
        workload, variant=variant, requests=requests, tick_s=0.0, launch_s=0.0, drains_at_s=0.0,
        policies=policies, limits=replace(workload.limits, aging_s=1e9),
    )  # fmt: skip
    assert workload.run(overlap=True).backend.rows == workload.run(overlap=False).backend.rows
