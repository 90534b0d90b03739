"""A scheduler on a virtual clock with a model that costs one step each: what happens is up to the test.

`VirtualLab` plays engine and backend, and checks at every step what must always hold: slots, KV and step
tokens within their limits, chunks that continue where the last ended, decode rows first, dead rows at
their last position, nobody preempted for the sake of one that stands behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from adapters.base import KV_BLOCK, FinishReason, SamplingParams, Sequence, SequenceState, StepOutput
from services.engine.limits import SchedulerLimits
from services.engine.messages import SequenceUpdate
from services.engine.policies import Policies
from services.engine.scheduler import Outcome, Scheduler, StepPlan
from services.strategies import VARIANTS
from services.strategies.base import BatchingStrategy, StrategyConfig

EOS = 2
WORD = 7
LIMITS = SchedulerLimits(
    kv_capacity_tokens=10_000, max_model_len=1000, max_batch=4, max_step_tokens=64, prefill_chunk=8
)


def one_word(seq: Sequence) -> list[int]:
    return [WORD]


class VirtualLab:
    def __init__(
        self,
        strategy: str | type[BatchingStrategy],
        *,
        limits: SchedulerLimits = LIMITS,
        batch_wait_s: float = 5.0,
        step_s: float = 1.0,
        model: Callable[[Sequence], list[int]] = one_word,
        policies: Policies = Policies(),  # noqa: B008 frozen
    ) -> None:
        self.now_s = 0.0
        self.limits = limits
        self.step_s = step_s
        self.model = model
        make = VARIANTS[strategy] if isinstance(strategy, str) else strategy
        self.strategy = make(StrategyConfig(limits.max_batch, batch_wait_s))
        self.scheduler = Scheduler(self.strategy, limits, [EOS], policies)
        self.sequences: dict[int, Sequence] = {}
        self.published: dict[int, list[SequenceUpdate]] = {}
        self.policies = policies
        self.released: list[int] = []
        self.preempted: list[int] = []
        self.out: set[int] = set()  # preempted, and not back since
        self.batches: list[tuple[list[int], list[int]]] = []
        """For each step the ids of its live and of its dead rows."""
        self._num_cached: dict[int, int] = {}
        self._num_groups = 0

    def submit(
        self,
        *budgets: int,
        prompt: int = 3,
        priority: int = 1,
        params: SamplingParams | None = None,
        at_s: float | None = None,
        exclusive: bool = False,
        client: str = "",
    ) -> list[Sequence]:
        """One request with a prompt of `prompt` tokens for each of `budgets` (their max_tokens)."""
        self._num_groups += 1
        group = [
            Sequence(
                len(self.sequences) + index,
                [WORD] * prompt,
                replace(params or SamplingParams(), max_tokens=budget),
                priority=priority,
                group_id=self._num_groups,
                group_size=len(budgets),
                arrival_s=self.now_s if at_s is None else at_s,
                exclusive=exclusive,
                client=client,
            )
            for index, budget in enumerate(budgets)
        ]
        self.scheduler.add(group)
        self.sequences |= {seq.seq_id: seq for seq in group}
        return group

    def cancel(self, *sequences: Sequence, reason: FinishReason = "abort") -> Outcome:
        outcome = self.scheduler.cancel([seq.seq_id for seq in sequences], self.now_s, reason)
        self._book(outcome)
        return outcome

    def schedule(self) -> StepPlan:
        before = [seq for seq in self.sequences.values() if seq.state is SequenceState.RUNNING]
        plan = self.scheduler.schedule(self.now_s)
        out = [seq for seq in before if seq.seq_id in plan.released_seq_ids]
        assert plan.num_preempted == len(out)
        if out:
            stay = [self._rank(s) for s in self.sequences.values() if s.state is SequenceState.RUNNING]
            assert max(stay) < min(map(self._rank, out)), "the first of all is never preempted"
        self.preempted += [seq.seq_id for seq in out]
        self.out |= {seq.seq_id for seq in out}
        self.out -= {s.seq_id for s in self.sequences.values() if s.state is SequenceState.RUNNING}
        self._book(Outcome([], plan.released_seq_ids))
        self._check(plan)
        return plan

    def step(self) -> StepPlan:
        """Schedule and, if there is something to compute, compute it and let `step_s` pass."""
        plan = self.schedule()
        if plan.chunks:
            live = [chunk for chunk in plan.chunks if not chunk.dead]
            dead = [chunk.seq.seq_id for chunk in plan.chunks if chunk.dead]
            self.batches.append(([chunk.seq.seq_id for chunk in live], dead))
            outputs = [StepOutput(c.seq.seq_id, self.model(c.seq)) for c in live if c.samples]
            num_tokens = {c.seq.seq_id: c.seq.num_tokens for c in live}
            self.now_s += self.step_s
            released = self.scheduler.mark_launched(plan)
            outcome = self.scheduler.update_from_output(plan, outputs, self.now_s)
            for chunk in live:
                num_new = chunk.seq.num_tokens - num_tokens[chunk.seq.seq_id]
                self._num_cached[chunk.seq.seq_id] = chunk.start + chunk.num_tokens + max(0, num_new - 1)
            self._book(Outcome(outcome.updates, released + outcome.released_seq_ids))
        return plan

    def fail_step(self) -> StepPlan:
        plan = self.schedule()
        self.now_s += self.step_s
        self._book(self.scheduler.mark_failed(plan, "out of order", self.now_s))
        return plan

    def run(self, max_steps: int = 10_000) -> None:
        """Step until all is done, waiting for as long as the strategy asks."""
        for _ in range(max_steps):
            plan = self.step()
            if plan.chunks:
                continue
            if plan.recheck_at_s is None:
                assert self.scheduler.queue_depth == 0, "sequences wait and nobody will ever call them"
                return
            assert plan.recheck_at_s > self.now_s, "the strategy asks to be asked again at once"
            self.now_s = plan.recheck_at_s
        raise AssertionError(f"not done after {max_steps} steps")

    def _book(self, outcome: Outcome) -> None:
        for update in outcome.updates:
            self.published.setdefault(update.seq_id, []).append(update)
        self.released += outcome.released_seq_ids
        for seq_id in outcome.released_seq_ids:
            self._num_cached.pop(seq_id, None)

    def _rank(self, seq: Sequence) -> tuple[float, int]:
        return seq.arrival_s - seq.priority * self.limits.aging_s, seq.seq_id

    def _check(self, plan: StepPlan) -> None:
        ended = Counter(self.released)
        ended.subtract(self.preempted)
        holders = [
            seq
            for seq in self.sequences.values()
            if seq.admitted_s is not None and not ended[seq.seq_id] and seq.seq_id not in self.out
        ]
        limits, scheduler = self.limits, self.scheduler
        assert len(holders) <= limits.max_batch
        kv = self.policies.make_kv_policy()
        needed = [(seq.state is SequenceState.RUNNING, kv.num_tokens(seq)) for seq in holders]
        num_needed = sum(num_tokens for _, num_tokens in needed)
        if self.policies.prefix_cache:  # what is shared counts once
            assert scheduler.kv_used_tokens <= num_needed
        elif (
            kv.grows
        ):  # an ended one may have got its last token in the first place of a block it does not have
            num_needed_at_least = num_needed - kv.block_tokens * sum(not lives for lives, _ in needed)
            assert num_needed_at_least <= scheduler.kv_used_tokens <= num_needed
        else:
            assert scheduler.kv_used_tokens == num_needed
        assert scheduler.kv_used_tokens <= limits.kv_capacity_tokens
        assert sum(chunk.num_tokens for chunk in plan.chunks) <= limits.max_step_tokens
        pads = limits.pads_like_generate
        assert pads or len({chunk.seq.seq_id for chunk in plan.chunks}) == len(plan.chunks)
        assert all(chunk.seq in holders for chunk in plan.chunks)
        assert plan.num_dead_rows == sum(chunk.dead for chunk in plan.chunks)
        assert plan.num_rows == len(plan.chunks) - plan.num_dead_rows
        if any(chunk.seq.exclusive for chunk in plan.chunks):
            assert len(plan.chunks) == 1, "it shares no step"
        assert pads or bool(plan.num_rows) == bool(plan.chunks), "a step of dead rows only"
        is_row = [chunk.dead or chunk.is_decode for chunk in plan.chunks]
        assert is_row == sorted(is_row, reverse=True), "decode goes first"
        for chunk in plan.chunks:
            hit = chunk.seq.num_computed_tokens if self.policies.prefix_cache else 0
            num_cached = self._num_cached.get(chunk.seq.seq_id, hit)
            end = chunk.start + chunk.num_tokens
            if chunk.dead:
                assert chunk.start >= KV_BLOCK * len(chunk.seq.prefix_keys), "it writes where others read"
                assert chunk.num_tokens == 1
                assert chunk.start >= num_cached if pads else chunk.start == num_cached - 1
                continue
            assert chunk.start == num_cached
            assert end <= chunk.seq.num_tokens
            if end < chunk.seq.num_tokens:
                assert end % limits.prefill_chunk == 0
