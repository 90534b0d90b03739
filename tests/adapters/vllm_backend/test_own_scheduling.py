"""vLLM with its own scheduler: it answers as when it is driven, says what it computed, and lets go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import count
from typing import Any

import pytest

from adapters.base import BackendError, OwnStep, SamplingParams, SchedulingEngine, Sequence
from adapters.registry import create_scheduling_engine
from tests.adapters.configs import make_config
from tests.adapters.conformance import (
    GREEDY,
    MAX_BATCH,
    MAX_MODEL_LEN,
    PENALIZED,
    SAMPLED,
    Driver,
    tiny_llama,
    vllm_backend,
)

pytest.importorskip("vllm", reason="needs the environment of adapters/vllm_backend")
pytestmark = pytest.mark.engines

_ids = count(1)


def own_engine(**settings: Any) -> SchedulingEngine:
    limits = {"max_batch_size": MAX_BATCH, "max_model_len": MAX_MODEL_LEN}
    return create_scheduling_engine(
        make_config("vllm", model=tiny_llama(), dtype="fp32", num_threads=1, **{**limits, **settings})
    )


def prompts(*lengths: int) -> list[list[int]]:
    return [[(7 * length + 3 * place) % 250 for place in range(length)] for length in lengths]


ASKED = [(prompt, params) for prompt in prompts(9, 70, 33) for params in (GREEDY, SAMPLED, PENALIZED)]


@pytest.fixture(scope="module")
def driven() -> list[list[int]]:
    """What the engine answers where the lab drives it; two engines of vLLM do not live in one process."""
    driver = Driver(vllm_backend())
    answers = [driver.alone(Sequence(next(_ids), prompt, params), 12) for prompt, params in ASKED]
    driver.backend.close()
    return answers


@pytest.fixture(scope="module")
def engine(driven: list[list[int]]) -> Iterator[SchedulingEngine]:
    engine = own_engine()
    yield engine
    engine.close()


def sequence(prompt: list[int], max_tokens: int, params: SamplingParams = GREEDY, **changes: Any) -> Sequence:
    names = ("temperature", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty")
    kept = {name: getattr(params, name) for name in names}
    return Sequence(next(_ids), prompt, SamplingParams(max_tokens, **{"ignore_eos": True, **kept, **changes}))


def answers(engine: SchedulingEngine, *sequences: Sequence) -> tuple[list[list[int]], list[OwnStep]]:
    """The tokens of each, and the steps that gave them; outputs are booked as the service books them."""
    for seq in sequences:
        engine.add(seq)
    steps: list[OwnStep] = []
    by_id = {seq.seq_id: seq for seq in sequences}
    while engine.has_work:
        steps.append(engine.step())
        for output in steps[-1].outputs:
            by_id[output.seq_id].output_token_ids += output.token_ids
        engine.release(steps[-1].ended_seq_ids)
    return [seq.output_token_ids for seq in sequences], steps


def test_it_gives_the_tokens_that_the_driven_engine_gives(
    engine: SchedulingEngine, driven: list[list[int]]
) -> None:
    together, _ = answers(engine, *(sequence(prompt, 12, params) for prompt, params in ASKED))
    assert together == driven


def test_steps_say_what_was_computed(engine: SchedulingEngine) -> None:
    first, second = (sequence(prompt, 3) for prompt in prompts(20, 30))
    _, steps = answers(engine, first, second)
    rows = [[(chunk.seq.seq_id, chunk.start, chunk.num_tokens) for chunk in step.chunks] for step in steps]
    one, two = first.seq_id, second.seq_id
    assert rows == [
        [(one, 0, 20), (two, 0, 30)],
        [(one, 20, 1), (two, 30, 1)],
        [(one, 21, 1), (two, 31, 1)],
    ]
    assert [step.ended_seq_ids for step in steps] == [[], [], [one, two]]
    assert (steps[0].num_running, steps[0].queue_depth, steps[0].kv_used_tokens) == (2, 0, 64)
    assert (steps[2].num_running, steps[2].kv_used_tokens) == (0, 0)


def test_who_finds_no_slot_waits(engine: SchedulingEngine) -> None:
    sequences = [sequence(prompt, 2) for prompt in prompts(*range(5, 11))]
    tokens, steps = answers(engine, *sequences)
    assert [len(own) for own in tokens] == [2] * 6
    assert [(len(step.chunks), step.queue_depth) for step in steps] == [(4, 2), (4, 2), (2, 0), (2, 0)]


def test_ends_of_text_and_stop_tokens_end_an_answer(engine: SchedulingEngine) -> None:
    (prompt,) = prompts(15)
    ((*_, stop),), _ = answers(engine, sequence(prompt, 5))
    (tokens,), _ = answers(engine, sequence(prompt, 9, stop_token_ids=(stop,)))
    assert tokens[-1] == stop
    assert len(tokens) <= 5
    (eos,) = engine.info.eos_token_ids
    for seed in range(200):
        fields = {"temperature": 2.0, "seed": seed}
        (whole,), _ = answers(engine, sequence(prompt, 60, **fields))
        if eos in whole[:-1]:
            break
    (ended,), _ = answers(engine, sequence(prompt, 60, ignore_eos=False, **fields))
    assert ended == whole[: whole.index(eos) + 1]


def test_a_cancelled_sequence_is_not_computed_again(engine: SchedulingEngine) -> None:
    gone, stays = (sequence(prompt, 6) for prompt in prompts(12, 13))
    engine.add(gone)
    engine.add(stays)
    engine.step()
    engine.release([gone.seq_id, 10**9])
    made: Seq[OwnStep] = [engine.step() for _ in range(5)]
    assert [[chunk.seq.seq_id for chunk in step.chunks] for step in made] == [[stays.seq_id]] * 5
    assert not engine.has_work
    engine.release([stays.seq_id])


def test_what_vllm_refuses_is_a_sentence(engine: SchedulingEngine) -> None:
    with pytest.raises(BackendError, match="vLLM refuses the request"):
        engine.add(sequence([1] * (MAX_MODEL_LEN + 10), 4))
    assert not engine.has_work


def test_a_seeded_prompt_that_is_cut_gets_what_it_gets_whole() -> None:
    """A generator of a CPU cannot be wound back, which vLLM asks of it."""
    tokens = []
    for budget in (512, 64):
        engine = own_engine(max_step_tokens=budget)
        (answer,), steps = answers(engine, sequence(prompts(200)[0], 10, SAMPLED))
        tokens.append(answer)
        assert len(steps) == 10 + (200 - 1) // budget
        engine.close()
    assert tokens[0] == tokens[1]


def test_a_full_cache_makes_vllm_preempt_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = own_engine(vllm_cache_tokens=MAX_MODEL_LEN)
    sequences = [sequence(prompt, 40) for prompt in prompts(150, 140, 90)]
    with caplog.at_level(logging.INFO):
        tokens, steps = answers(engine, *sequences)
    assert sum(len(step.preempted_seq_ids) for step in steps) > 0
    assert "preempted sequences" in caplog.text
    again, _ = answers(engine, *(sequence(seq.prompt_token_ids, 40) for seq in sequences[:1]))
    assert again[0] == tokens[0]
    engine.close()
