"""What must hold for any traffic. `VirtualLab` checks slots, KV, step tokens and chunks at every step."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.base import SamplingParams, Sequence
from services.admissions import ADMISSIONS
from services.engine.limits import SchedulerLimits
from services.engine.policies import Policies
from services.kv_policies import KV_POLICIES
from services.layouts import LAYOUTS
from services.orders import ORDERS
from services.strategies import VARIANTS
from tests.services.virtual_lab import EOS, LIMITS, WORD, VirtualLab

MAX_PROMPT, MAX_BUDGET = 36, 12  # three blocks together
AGING_S = 3.0


@dataclass(frozen=True)
class Arrive:
    prompt: int
    budgets: list[int]
    priority: int
    ignore_eos: bool
    exclusive: bool = False


@dataclass(frozen=True)
class CancelOne:
    which: int


@dataclass(frozen=True)
class Fail:
    pass


@dataclass(frozen=True)
class Pass:
    num_steps: int


Event = Arrive | CancelOne | Fail | Pass

ARRIVALS = st.builds(
    Arrive,
    prompt=st.integers(1, MAX_PROMPT),
    budgets=st.lists(st.integers(1, MAX_BUDGET), min_size=1, max_size=7),
    priority=st.integers(0, 2),
    ignore_eos=st.booleans(),
    exclusive=st.sampled_from([False] * 5 + [True]),
)
PASSES = st.builds(Pass, st.integers(1, 6))
QUIET = st.lists(ARRIVALS | PASSES, min_size=1, max_size=25)
ROUGH = st.lists(
    ARRIVALS | PASSES | st.builds(CancelOne, st.integers(0, 99)) | st.just(Fail()), min_size=1, max_size=25
)
LIMITS_OF_ALL_SIZES = st.builds(
    lambda max_batch, chunk, spare, slots_of_kv, pad, threshold: replace(
        LIMITS,
        max_batch=max_batch,
        prefill_chunk=chunk,
        max_step_tokens=max_batch + chunk + spare,
        # From room for one sequence alone to room for all; groups of seven run in slices.
        kv_capacity_tokens=(MAX_PROMPT + MAX_BUDGET) * max(slots_of_kv, 1),
        max_model_len=MAX_PROMPT + MAX_BUDGET,
        pad_finished=pad,
        long_prefill_token_threshold=threshold,
        aging_s=AGING_S,
    ),
    st.integers(1, 6),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 40),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([0, 5, 20]),
)


def ends_at(seq: Sequence) -> int:
    """Where this model gives its end-of-sequence token; sometimes never."""
    return 1 + seq.seq_id * 7 % (MAX_BUDGET + 4)


def model(seq: Sequence) -> list[int]:
    return [EOS] if len(seq.output_token_ids) + 1 == ends_at(seq) else [WORD]


POLICIES = st.builds(
    Policies,
    order=st.sampled_from(sorted(ORDERS)),
    admission=st.sampled_from(sorted(ADMISSIONS)),
    step_layout=st.sampled_from(sorted(LAYOUTS)),
    length_oracle=st.sampled_from(["max_tokens", "1.0"]),
    kv_policy=st.sampled_from(sorted(KV_POLICIES)),
    kv_watermark=st.sampled_from([0.0, 0.01, 0.3]),
) | st.builds(
    Policies,
    kv_policy=st.just("paged"),
    prefix_cache=st.booleans(),
    priority_preemption=st.booleans(),
    admission=st.sampled_from(sorted(ADMISSIONS)),
)


def replay(
    variant: str,
    limits: SchedulerLimits,
    events: list[Event],
    policies: Policies = Policies(),  # noqa: B008 frozen
) -> VirtualLab:
    lab = VirtualLab(variant, limits=limits, batch_wait_s=2.0, step_s=0.5, model=model, policies=policies)
    for event in events:
        match event:
            case Arrive(prompt, budgets, priority, ignore_eos, exclusive):
                fitting = lab.limits.kv_capacity_tokens // (prompt + MAX_BUDGET)
                lab.submit(
                    *budgets[:fitting],
                    prompt=prompt,
                    priority=priority,
                    exclusive=exclusive,
                    client=str(prompt % 3),
                    params=SamplingParams(ignore_eos=ignore_eos),
                )
            case Pass(num_steps):
                for _ in range(num_steps):
                    if not lab.step().chunks:
                        lab.now_s += 0.5
            case CancelOne(which) if lab.sequences:
                lab.cancel(lab.sequences[which % len(lab.sequences)])
            case Fail():
                lab.fail_step()
    lab.run()
    return lab


def assert_all_is_accounted_for(lab: VirtualLab) -> None:
    scheduler = lab.scheduler
    assert (scheduler.queue_depth, scheduler.num_running, scheduler.kv_used_tokens) == (0, 0, 0)
    admitted = [seq.seq_id for seq in lab.sequences.values() if seq.admitted_s is not None]
    assert sorted([*lab.released, *lab.out]) == sorted(admitted + lab.preempted)
    for seq in lab.sequences.values():
        updates = lab.published[seq.seq_id]
        assert [token_id for update in updates for token_id in update.token_ids] == seq.output_token_ids
        assert [update.finish_reason for update in updates[:-1]] == [None] * (len(updates) - 1)
        last = updates[-1]
        assert last.finish_reason == seq.finish_reason
        assert seq.finish_reason is not None
        assert last.timings is not None
        assert seq.finished_s is not None
        t = last.timings
        parts = [t.queue_s, t.batch_wait_s, t.prefill_s, t.decode_s]
        assert min(parts) >= 0
        assert abs(sum(parts) - (seq.finished_s - seq.arrival_s)) < 1e-6
        assert 0 <= t.mean_batch_size <= lab.limits.max_batch


@given(st.sampled_from(sorted(VARIANTS)), LIMITS_OF_ALL_SIZES, QUIET, POLICIES)
@settings(max_examples=150, deadline=None)
def test_every_sequence_ends_with_exactly_its_tokens(
    variant: str, limits: SchedulerLimits, events: list[Event], policies: Policies
) -> None:
    lab = replay(variant, limits, events, policies)
    assert_all_is_accounted_for(lab)
    for seq in lab.sequences.values():
        stop, length = ends_at(seq), seq.params.max_tokens
        stops = stop <= length and not seq.params.ignore_eos
        num_tokens = stop if stops else length
        assert seq.output_token_ids == [EOS if n == stop else WORD for n in range(1, num_tokens + 1)]
        assert seq.finish_reason == ("stop" if stops else "length")


@given(st.sampled_from(sorted(VARIANTS)), LIMITS_OF_ALL_SIZES, ROUGH, POLICIES)
@settings(max_examples=150, deadline=None)
def test_cancels_and_failures_leave_nothing_behind(
    variant: str, limits: SchedulerLimits, events: list[Event], policies: Policies
) -> None:
    assert_all_is_accounted_for(replay(variant, limits, events, policies))


@given(LIMITS_OF_ALL_SIZES, QUIET)
@settings(max_examples=100, deadline=None)
def test_no_prompt_starves_in_the_batch(limits: SchedulerLimits, events: list[Event]) -> None:
    """At the latest, its first token comes when all admitted before it have been computed chunk by chunk.

    An exclusive sequence leaves the others every second step, and shares its own with others of its kind.
    """
    lab = replay("continuous", limits, events)
    sequences = [(seq, seq.admitted_s, seq.first_token_s) for seq in lab.sequences.values()]
    for seq, admitted_s, first_token_s in sequences:
        assert admitted_s is not None
        assert first_token_s is not None
        before = [
            other
            for other, other_admitted_s, other_first_s in sequences
            if other_admitted_s is not None
            and other_first_s is not None
            and other_admitted_s <= admitted_s < other_first_s
        ]
        most_steps = sum(-(-other.num_prompt_tokens // limits.prefill_chunk) for other in before)
        num_exclusive = sum(other.exclusive for other in lab.sequences.values())
        most_steps *= 2 * (num_exclusive if seq.exclusive else 1) if num_exclusive else 1
        assert round((first_token_s - admitted_s) / lab.step_s) <= most_steps


@given(LIMITS_OF_ALL_SIZES, QUIET, st.booleans())
@settings(max_examples=150, deadline=None)
def test_nobody_is_overtaken_by_those_who_come_too_late(
    limits: SchedulerLimits, events: list[Event], preempts: bool
) -> None:
    """Nor preempted, which the lab checks at every step: by rank, arrival and priority with aging."""
    policies = Policies(kv_policy="paged", priority_preemption=True) if preempts else Policies()
    sequences = replay("continuous", limits, events, policies).sequences.values()
    waits = [(seq, seq.admitted_s) for seq in sequences if seq.admitted_s is not None]
    assert len(waits) == len(sequences)
    for first, first_admitted_s in waits:
        for second, second_admitted_s in waits:
            if second.arrival_s <= first_admitted_s < second_admitted_s:
                head_start_s = (first.priority - second.priority) * AGING_S
                assert first.arrival_s <= second.arrival_s + head_start_s


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_no_block_is_lost_or_freed_twice_in_a_long_run(variant: str, prefix_cache: bool) -> None:
    """2,500 steps for each of the strategies, with all kinds of events, in the memory of three sequences."""
    rng = random.Random(variant)
    limits = replace(LIMITS, kv_capacity_tokens=144, max_model_len=48, max_batch=8, aging_s=AGING_S)
    policies = Policies(
        kv_policy="paged", kv_watermark=0.0, prefix_cache=prefix_cache, priority_preemption=prefix_cache
    )
    lab = VirtualLab(variant, limits=limits, batch_wait_s=2.0, step_s=0.5, model=model, policies=policies)
    while len(lab.batches) < 2500:
        if lab.scheduler.queue_depth < 8:
            budgets = [rng.randint(1, MAX_BUDGET) for _ in range(rng.randint(1, 3))]
            params = SamplingParams(ignore_eos=rng.random() < 0.5)
            exclusive = rng.random() < 0.05
            prompt, priority = rng.randint(1, MAX_PROMPT), rng.randrange(3)
            lab.submit(*budgets, prompt=prompt, priority=priority, params=params, exclusive=exclusive)
        if rng.random() < 0.03:
            lab.cancel(*rng.sample(sorted(lab.sequences.values(), key=lambda seq: seq.seq_id)[-20:], 1))
        if rng.random() < 0.01:
            lab.fail_step()
        elif not lab.step().chunks:
            lab.now_s += 0.5
    lab.run()
    assert_all_is_accounted_for(lab)
    # A group that runs together must fit with its budgets, so in static nobody outgrows another.
    assert bool(lab.preempted) == (variant in ("continuous", "dynamic"))
