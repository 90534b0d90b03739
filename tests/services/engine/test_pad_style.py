"""PAD_STYLE=generate: what a padded batch computes for nothing, row by row. No token changes for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.base import BackendConfig, BackendInfo, ConfigError, SamplingParams, Sequence
from adapters.null_backend import NullBackend
from services.engine.engine import Engine
from services.engine.messages import Submit
from services.engine.policies import Policies
from services.engine.scheduler import Scheduler
from services.engine.spec import EngineSpec, PadStyle
from services.engine.step_plan import StepPlan, contexts
from services.strategies import VARIANTS
from tests.services.virtual_lab import LIMITS, VirtualLab
from tests.services.virtual_time import Clock, ScriptedInbox

PROMPTS, BUDGETS = (3, 9, 5), (2, 6, 1)
GENERATE = replace(LIMITS, pads_like_generate=True, prefill_chunk=16)


def steps_of(lab: VirtualLab) -> list[StepPlan]:
    steps: list[StepPlan] = []
    while True:
        plan = lab.step()
        if plan.chunks:
            steps.append(plan)
        elif plan.recheck_at_s is None:
            return steps
        else:
            lab.now_s = plan.recheck_at_s


def batch(lab: VirtualLab) -> list[Sequence]:
    return [s for n, budget in zip(PROMPTS, BUDGETS, strict=True) for s in lab.submit(budget, prompt=n)]


def test_rows_and_contexts_are_those_of_padded_generate() -> None:
    lab = VirtualLab("dynamic", limits=GENERATE)
    sequences = batch(lab)
    prompts, padding, *decodes = steps_of(lab)
    # Every row has a prompt as long as the longest, and as many decode steps as the longest answer.
    assert prompts.num_prompt_tokens + padding.num_dead_rows == len(PROMPTS) * max(PROMPTS)
    assert padding.num_rows == 0
    assert [(c.seq.seq_id, c.start) for c in padding.chunks] == [
        *((0, at) for at in range(3, 9)),
        *((2, at) for at in range(5, 9)),
    ]
    assert len(decodes) == max(BUDGETS) - 1
    for number, step in enumerate(decodes, 1):
        assert step.num_rows + step.num_dead_rows == len(PROMPTS)
        assert step.num_rows == sum(budget > number for budget in BUDGETS)
        # Dead rows grow like live ones, a token more in each step; the one that ended with its prompt does so
        # from its padding on.
        assert contexts(step.chunks)["decode_context_tokens"] == sum(n + number for n in (3, 9, 9))
    assert [len(seq.output_token_ids) for seq in sequences] == list(BUDGETS)


def test_lean_rows_stay_where_they_are_and_nothing_is_padded() -> None:
    lab = VirtualLab("dynamic", limits=replace(GENERATE, pads_like_generate=False))
    batch(lab)
    prompts, *decodes = steps_of(lab)
    assert prompts.num_dead_rows == 0
    assert len(decodes) == max(BUDGETS) - 1
    dead = [[c.start for c in step.chunks if c.dead] for step in decodes]
    # Prompts of 3 and 5 with answers of 2 and 1: the last position whose keys are there.
    assert dead == [[4], *[[3, 4]] * 4]


def test_padding_in_several_steps_when_it_is_more_than_one_holds() -> None:
    lab = VirtualLab("static", limits=replace(GENERATE, max_step_tokens=20))
    lab.submit(2, prompt=30)
    assert [plan.num_dead_rows for plan in steps_of(lab)] == [0, 0, 0], "one alone is not padded"
    lab = VirtualLab("dynamic", limits=replace(GENERATE, max_step_tokens=20))
    lab.submit(3, prompt=2)
    lab.submit(3, prompt=32)
    padding = [plan.num_dead_rows for plan in steps_of(lab) if not plan.num_rows]
    assert padding == [20, 10]


def test_padding_ends_with_its_batch() -> None:
    lab = VirtualLab("dynamic", limits=GENERATE)
    for number in (3, 9, 5):
        lab.submit(1, prompt=number)
    lab.now_s = 5.0
    assert lab.step().num_prompt_tokens == 17
    lab.submit(2, prompt=4, at_s=0.0)
    assert [(plan.num_prompt_tokens, plan.num_dead_rows) for plan in steps_of(lab)] == [(4, 0), (0, 0)]


def test_a_row_that_grows_ends_at_the_longest_length() -> None:
    lab = VirtualLab("dynamic", limits=replace(GENERATE, max_model_len=12))
    lab.submit(1, prompt=9)
    lab.submit(9, prompt=3)
    starts = [c.start for plan in steps_of(lab) if plan.num_rows for c in plan.chunks if c.dead]
    assert starts == [9, 10, 11, 11, 11, 11, 11, 11]


def test_a_failed_step_of_padding_ends_nobody_that_runs() -> None:
    lab = VirtualLab("dynamic", limits=GENERATE)
    batch(lab)
    lab.now_s = 5.0
    assert lab.step().num_prompt_tokens == sum(PROMPTS)
    assert not lab.fail_step().num_rows
    lab.run()
    assert [lab.published[number][-1].finish_reason for number in range(3)] == ["length"] * 3


@pytest.mark.parametrize("strategy", ["static", "dynamic"])
def test_no_token_changes(strategy: str) -> None:
    def answers(style: PadStyle) -> list[list[int]]:
        backend, clock = NullBackend(BackendConfig(max_batch_size=4)), Clock()
        spec = EngineSpec(strategy, BackendConfig(max_batch_size=4), {"batch_wait_s": 0.0}, pad_style=style)
        scheduler = Scheduler(VARIANTS[strategy](spec.strategy), spec.limits(backend.info))
        engine = Engine(backend, scheduler, publish=lambda _: None, clock=clock)
        group = [
            Sequence(number, [65] * num, SamplingParams(max_tokens=budget, ignore_eos=True), arrival_s=50.0)
            for number, (num, budget) in enumerate(zip(PROMPTS, BUDGETS, strict=True))
        ]
        engine.run(ScriptedInbox(clock, [(0.0, Submit(group))]))
        return [seq.output_token_ids for seq in group]

    assert answers("lean") == answers("generate")
    assert list(map(len, answers("lean"))) == list(BUDGETS)


def info(*, computes_padding: bool = True) -> BackendInfo:
    known = NullBackend(BackendConfig(backend="null")).info
    return replace(known, computes_padding=computes_padding)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (EngineSpec("static", pad_finished=False, pad_style="generate"), "needs PAD_FINISHED=1"),
        (
            EngineSpec("dynamic", policies=Policies(kv_policy="paged"), pad_style="generate"),
            "needs KV_POLICY=reserve",
        ),
    ],
)
def test_what_it_cannot_be_had_with(spec: EngineSpec, told: str) -> None:
    with pytest.raises(ConfigError, match=f"PAD_STYLE=generate .*{told}"):
        spec.limits(info())


def test_a_backend_that_cannot_is_named() -> None:
    with pytest.raises(ConfigError, match="torch on a CPU or null, not null on none"):
        EngineSpec("static", pad_style="generate").limits(info(computes_padding=False))
    assert not EngineSpec("continuous", pad_style="generate").limits(info()).pads_like_generate
