"""Who holds how much memory, who is preempted for whom, and that a preempted answer goes on where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.base import BackendInfo, ConfigError, SequenceState
from services.engine.policies import Policies
from services.engine.spec import EngineSpec
from tests.services.overlap_lab import LIMITS as OVERLAP_LIMITS
from tests.services.overlap_lab import OverlapLab, request
from tests.services.virtual_lab import LIMITS, WORD, VirtualLab

PAGED = Policies(kv_policy="paged", kv_watermark=0.0)


def lab_of(num_blocks: int, variant: str = "continuous", policies: Policies = PAGED) -> VirtualLab:
    return VirtualLab(variant, limits=replace(LIMITS, kv_capacity_tokens=16 * num_blocks), policies=policies)


def steps(lab: VirtualLab, count: int) -> None:
    for _ in range(count):
        lab.step()


def test_a_sequence_holds_blocks_for_what_is_there() -> None:
    lab = lab_of(8)
    lab.submit(100, prompt=16)
    held = []
    for _ in range(18):
        lab.step()
        held.append(lab.scheduler.kv_used_tokens)
    assert held == [16] + [32] * 16 + [48]


def test_more_sequences_join_than_their_budgets_would_allow() -> None:
    budgets = [100, 20, 20, 20]
    for policies, num_running in ((Policies(), 1), (PAGED, 4)):
        lab = lab_of(8, policies=policies)
        lab.submit(*budgets, prompt=8)
        lab.step()
        assert lab.scheduler.num_running == num_running
        lab.run()
        assert all(len(seq.output_token_ids) == seq.params.max_tokens for seq in lab.sequences.values())


def test_the_watermark_stays_free_unless_nothing_runs() -> None:
    lab = lab_of(8, policies=replace(PAGED, kv_watermark=0.5))
    lab.submit(10, prompt=80)  # five of eight blocks, alone
    lab.submit(10, prompt=3)
    steps(lab, 3)
    assert lab.scheduler.num_running == 1
    lab.run()
    assert not lab.preempted


def test_the_lowest_priority_and_then_the_latest_arrival_goes() -> None:
    lab = lab_of(3)
    (low,) = lab.submit(20, prompt=15, priority=0)
    lab.now_s += 1
    (first,) = lab.submit(20, prompt=15)
    lab.now_s += 1
    (second,) = lab.submit(20, prompt=15)
    while len(lab.preempted) < 2:
        lab.step()
    assert lab.preempted == [low.seq_id, second.seq_id]
    assert first.state is SequenceState.RUNNING
    assert [seq.seq_id for seq in lab.scheduler._waiting.sequences] == [second.seq_id, low.seq_id]
    lab.run()
    assert first.finished_s is not None
    assert second.finished_s is not None
    assert low.finished_s is not None
    assert first.finished_s < second.finished_s < low.finished_s


@pytest.mark.parametrize("order", ["fcfs", "sjf", "hrrn", "vtc", "multi_bin"])
def test_a_preempted_sequence_is_the_next_to_join_under_every_order(order: str) -> None:
    lab = lab_of(4, policies=replace(PAGED, order=order))
    lab.submit(40, prompt=15)
    (late,) = lab.submit(30, prompt=31)
    while not lab.preempted:
        lab.step()
    num_known = late.num_tokens
    (short,) = lab.submit(1, prompt=1)
    lab.run()
    assert late.num_prefill_tokens == num_known
    assert late.output_token_ids == [WORD] * 30
    assert late.admitted_s == 0.0
    assert short.admitted_s is not None
    assert late.finished_s is not None
    assert lab.sequences[0].finished_s is not None
    assert short.admitted_s >= lab.sequences[0].finished_s


PRIORITY = replace(PAGED, priority_preemption=True)


@pytest.mark.parametrize("scarce", ["slots", "memory"])
def test_a_higher_priority_takes_the_place_of_a_lower_one_that_goes_on_later(scarce: str) -> None:
    num_blocks, max_batch = (100, 2) if scarce == "slots" else (4, 4)
    limits = replace(LIMITS, kv_capacity_tokens=16 * num_blocks, max_batch=max_batch)
    ended: dict[bool, list[float | None]] = {}
    for preempts in (False, True):
        lab = VirtualLab("continuous", limits=limits, policies=replace(PAGED, priority_preemption=preempts))
        (low,) = lab.submit(10, prompt=20, priority=0)
        (middle,) = lab.submit(10, prompt=20)
        steps(lab, 3)
        (high,) = lab.submit(3, prompt=20, priority=2)
        plan = lab.step()
        assert plan.num_preempted == int(preempts)
        assert lab.preempted == [low.seq_id] * preempts
        assert (high.state is SequenceState.RUNNING) == preempts
        lab.run()
        assert [len(seq.output_token_ids) for seq in (low, middle, high)] == [10, 10, 3]
        assert low.num_prefill_tokens == (20 + 3 if preempts else 20), "its output so far is computed again"
        ended[preempts] = [seq.finished_s for seq in (high, middle, low)]
    assert ended == {False: [13.0, 10.0, 10.0], True: [6.0, 10.0, 13.0]}


def test_nobody_takes_the_place_of_his_equal_or_of_one_that_waited_for_long() -> None:
    lab = lab_of(100, policies=PRIORITY)
    lab.submit(40, 40, 40, 40)
    steps(lab, 1)
    (equal,) = lab.submit(1)
    assert not lab.step().num_preempted
    lab.cancel(equal)
    lab.now_s = LIMITS.aging_s
    lab.submit(1, priority=2)
    assert not lab.step().num_preempted
    lab.run()


def test_nobody_is_preempted_in_vain() -> None:
    """The higher priority needs three blocks of four; those behind it hold two of them."""
    lab = lab_of(4, policies=PRIORITY)
    (first,) = lab.submit(10, prompt=20, priority=2)
    (low,) = lab.submit(10, prompt=20, priority=0)
    steps(lab, 1)
    lab.submit(1, prompt=40, priority=2)
    assert not lab.step().num_preempted
    lab.run()
    assert not lab.preempted
    assert first.finished_s == low.finished_s


def test_a_preempted_sequence_does_not_bar_the_way_of_a_higher_priority() -> None:
    lab = lab_of(4, policies=PRIORITY)
    (first,) = lab.submit(30, prompt=31, priority=1)
    (low,) = lab.submit(10, prompt=31, priority=0)
    while not lab.preempted:
        lab.step()
    (high,) = lab.submit(1, prompt=10, priority=2)
    lab.step()
    assert high.finished_s is not None
    assert (first.finished_s, low.finished_s) == (None, None)
    lab.run()
    assert len(low.output_token_ids) == 10


@pytest.mark.parametrize("settings", [{"order": "sjf", "kv_policy": "paged"}, {"kv_policy": "reserve"}])
def test_priority_preemption_goes_with_paged_and_fcfs(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="it needs both, not ORDER"):
        Policies(priority_preemption=True, **settings)


def test_dead_rows_go_before_anybody_is_preempted() -> None:
    lab = lab_of(4, "dynamic")
    lab.submit(2, prompt=15)
    lab.submit(2, prompt=15)
    (long,) = lab.submit(40, prompt=15)
    lab.submit(1, prompt=1)
    lab.run()
    assert len(long.output_token_ids) == 40
    assert not lab.preempted
    assert max(len(dead) for _, dead in lab.batches) >= 2
    assert lab.batches[-1] == ([long.seq_id], [])


def test_a_preempted_sequence_can_be_cancelled_and_leaves_nothing() -> None:
    lab = lab_of(3)
    lab.submit(20, prompt=15)
    (late,) = lab.submit(40, prompt=8)
    while not lab.preempted:
        lab.step()
    lab.cancel(late)
    assert lab.published[late.seq_id][-1].finish_reason == "abort"
    assert lab.scheduler.queue_depth == 0
    lab.run()
    assert lab.scheduler.kv_used_tokens == 0


@pytest.mark.parametrize("max_tokens", [20, 21, 22, 23, 30])
def test_the_token_that_a_launched_step_still_gives_counts(max_tokens: int) -> None:
    """Overlapped or not, the same answers; one of them may end with a token that comes after a preemption."""
    limits = replace(OVERLAP_LIMITS, kv_capacity_tokens=64)
    script = [request(seq_id, max_tokens, prompt=13, at_s=0.01 * seq_id) for seq_id in range(4)]
    answers = []
    for overlap, policies in ((False, Policies()), (False, PAGED), (True, PAGED)):
        lab = OverlapLab(limits=limits, overlap=overlap, policies=policies)
        lab.run(
            *[request(seq_id, max_tokens, prompt=13, at_s=0.01 * seq_id) for seq_id in range(len(script))]
        )
        assert sum(record.num_preempted for record in lab.records) > 0 or policies is not PAGED
        answers.append([lab.answer(seq_id) for seq_id in range(len(script))])
        assert lab.scheduler.kv_used_tokens == 0
    assert answers[0] == answers[1] == answers[2]


def test_the_setting_limits_the_memory_in_whole_blocks() -> None:
    info = BackendInfo("null", "null", "cpu", "none", 257, (256,), 4, 1000, 4000)

    def capacity(policies: Policies) -> int:
        return EngineSpec("continuous", policies=policies).limits(info).kv_capacity_tokens

    assert capacity(Policies()) == 4000
    assert capacity(Policies(kv_capacity_tokens=100)) == 100
    assert capacity(Policies(kv_capacity_tokens=9000)) == 4000
    assert capacity(replace(PAGED, kv_capacity_tokens=100)) == 96
    with pytest.raises(ConfigError, match="raise KV_CAPACITY_TOKENS"):
        capacity(replace(PAGED, kv_capacity_tokens=15))
    with pytest.raises(ConfigError, match="KV_POLICY is 'none'"):
        Policies(kv_policy="none")


def test_prompts_that_begin_alike_share_blocks_and_compute_the_rest() -> None:
    lab = lab_of(8, policies=replace(PAGED, prefix_cache=True))
    (first,) = lab.submit(3, prompt=50)
    lab.step()
    assert lab.scheduler.kv_used_tokens == 64
    (second,) = lab.submit(3, prompt=40)
    plan = lab.step()
    assert (plan.num_looked_up_tokens, plan.num_cached_tokens) == (40, 32)
    assert plan.num_prompt_tokens == 8
    assert first.block_ids[:2] == second.block_ids[:2]
    assert lab.scheduler.kv_used_tokens == 64 + 16
    lab.run()
    assert lab.scheduler.kv_used_tokens == 0
    timings = [lab.published[seq.seq_id][-1].timings for seq in (first, second)]
    assert [t.num_cached_tokens for t in timings if t] == [0, 32]
    (third,) = lab.submit(3, prompt=50)  # what nobody holds any more is still found
    lab.run()
    assert third.num_cached_tokens == 48
    assert third.output_token_ids == first.output_token_ids


def test_a_hit_ends_where_a_prompt_may_be_cut() -> None:
    limits = replace(LIMITS, kv_capacity_tokens=256, prefill_chunk=32, max_step_tokens=128)
    lab = VirtualLab("continuous", limits=limits, policies=replace(PAGED, prefix_cache=True))
    for _ in range(2):
        (seq,) = lab.submit(3, prompt=60)
        lab.run()
    assert seq.num_cached_tokens == 32


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_cancelled_row_writes_no_block_that_others_read(num_steps: int) -> None:
    """It leaves a padded batch at once while its prompt is not whole: its last position may be shared."""
    limits = replace(LIMITS, kv_capacity_tokens=512, max_step_tokens=32, prefill_chunk=16, max_batch=2)
    lab = VirtualLab("static", limits=limits, policies=replace(PAGED, prefix_cache=True))
    first, second = lab.submit(3, 3, prompt=60)
    steps(lab, num_steps)
    lab.cancel(second)
    lab.run()
    assert first.finish_reason == "length"
    assert lab.scheduler.kv_used_tokens == 0


def test_a_prefix_cache_needs_blocks() -> None:
    with pytest.raises(ConfigError, match="KV_POLICY=reserve has none: set KV_POLICY=paged"):
        Policies(prefix_cache=True)
    spec = EngineSpec("continuous", policies=replace(PAGED, prefix_cache=True))
    info = BackendInfo("llama_cpp", "m", "cpu", "none", 257, (256,), 4, 1000, 4000)
    with pytest.raises(ConfigError, match="which llama_cpp on cpu does not have"):
        spec.limits(info)
    spec.limits(replace(info, has_kv_blocks=True))
