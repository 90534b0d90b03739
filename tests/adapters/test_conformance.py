"""What every backend must hold, whoever shares the batch. Each test varies the batch, not only the run."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from adapters.base import Backend, BackendError, CapacityError, SamplingParams, ScheduledChunk, SequenceState
from tests.adapters.conformance import (
    CUT,
    FACTORIES,
    GREEDY,
    MAX_BATCH,
    MAX_MODEL_LEN,
    PENALIZED,
    SAMPLED,
    Driver,
    fail_next_step,
)

NO_ROOM = (BackendError, CapacityError)
LENGTHS = [1, CUT - 1, CUT, 2 * CUT + 5]


MARKS = {"llama_cpp": pytest.mark.llama} | dict.fromkeys(
    ("openvino", "onnx", "mlx", "vllm"), pytest.mark.engines
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[mark for kind, mark in MARKS.items() if name.startswith(kind)])
        for name in FACTORIES
    ],
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = FACTORIES[request.param]()
    yield backend
    backend.close()


@pytest.fixture
def driver(backend: Backend) -> Iterator[Driver]:
    driver = Driver(backend)
    yield driver
    driver.release_all()


def test_info_describes_a_usable_backend(backend: Backend) -> None:
    info = backend.info
    assert isinstance(backend, Backend)
    assert info.max_batch_size == MAX_BATCH
    assert info.max_model_len == MAX_MODEL_LEN
    assert info.max_model_len <= info.kv_capacity_tokens
    assert info.eos_token_ids
    assert all(0 <= token_id < info.vocab_size for token_id in info.eos_token_ids)


def test_its_description_reaches_the_api_without_the_libraries_behind_it(backend: Backend) -> None:
    classes = {
        f"{module}.{name}"
        for op, argument, _ in pickletools.genops(pickle.dumps(backend.info, protocol=2))
        if op.name == "GLOBAL"
        for module, name in [argument.split(" ")]
    }
    assert {name.partition(".")[0] for name in classes} <= {"adapters", "copyreg", "__builtin__"}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])
def test_batch_mates_change_nothing(driver: Driver, params: SamplingParams) -> None:
    together = [driver.start(length, params) for length in LENGTHS]
    driver.steps(6, *together)

    for seq in together:
        assert seq.output_token_ids == driver.alone(seq)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_order_in_the_step_changes_nothing(driver: Driver, params: SamplingParams) -> None:
    together = [driver.start(length, params) for length in LENGTHS]
    for shift in range(6):
        rotation = shift % len(together)
        driver.step(*together[rotation:], *together[:rotation])

    for seq in together:
        assert seq.output_token_ids == driver.alone(seq)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [2, 1, 1], [1, 3], [3, 1]])
def test_prompt_chunks_change_nothing(driver: Driver, params: SamplingParams, cuts: list[int]) -> None:
    seq = driver.start(3 * CUT + 7, params)
    mates = [driver.start(9), driver.start(CUT + 1, SAMPLED)]
    for num_cuts in cuts:
        driver.step(*mates, (seq, num_cuts * CUT))
    driver.steps(4, seq, *mates)

    assert len(seq.output_token_ids) == 5
    for one in (seq, *mates):
        assert one.output_token_ids == driver.alone(one)


def test_logprobs_are_the_model_s_own_and_given_only_where_asked(driver: Driver) -> None:
    if not driver.backend.info.has_logprobs:
        pytest.skip("this backend has none, and says so")
    plain = driver.start(9)
    asked = [driver.start(9, replace(params, num_logprobs=3)) for params in (GREEDY, PENALIZED, SAMPLED)]
    chunks = [ScheduledChunk(seq, 0, seq.num_tokens) for seq in (plain, *asked)]
    first, *told = driver.backend.step(chunks)
    assert first.logprobs is None
    for output in told:
        assert output.logprobs is not None
        ((own, top),) = output.logprobs
        assert own <= top[0][1] <= 0
        assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
        assert len(top) == 3
        assert own == dict(top).get(output.token_ids[0], own)
    assert told[0].logprobs is not None
    assert told[0].logprobs[0][1][0][0] == told[0].token_ids[0] == first.token_ids[0]
    # The same prompt: penalties, temperature and filters do not change what the model says. llama.cpp's
    # shared cache rounds each row in another way.
    tops = [output.logprobs[0][1] for output in told if output.logprobs]
    for top in tops[1:]:
        assert dict(top) == pytest.approx(dict(tops[0]), abs=1e-4)


def test_joining_and_leaving_change_nothing(driver: Driver) -> None:
    first, second = driver.start(20), driver.start(CUT + 3, SAMPLED)
    driver.steps(2, first)
    driver.step(first, (second, CUT))
    driver.steps(2, first, second)
    driver.release(first)
    third = driver.start(5, salt=1)
    driver.steps(4, second, third)

    for seq in (first, second, third):
        assert seq.output_token_ids == driver.alone(seq)


def test_a_sequence_may_pause(driver: Driver) -> None:
    paused, busy = driver.start(30, SAMPLED), driver.start(CUT)
    half_read = driver.start(CUT + 9)
    driver.step(paused, busy, (half_read, CUT))
    driver.steps(3, busy)
    driver.steps(3, paused, busy, half_read)

    for seq in (paused, busy, half_read):
        assert seq.output_token_ids == driver.alone(seq)


def test_a_chunk_that_ends_inside_the_prompt_gives_no_token(driver: Driver) -> None:
    seq = driver.start(2 * CUT + 1)
    driver.step((seq, CUT))
    driver.step((seq, CUT))
    assert seq.output_token_ids == []
    driver.step(seq)
    assert len(seq.output_token_ids) == 1


def test_equal_requests_get_equal_answers_side_by_side(driver: Driver) -> None:
    twins = [driver.start(40, SAMPLED), driver.start(40, SAMPLED)]
    driver.steps(6, driver.start(3), *twins)
    assert twins[0].output_token_ids == twins[1].output_token_ids


def test_prompts_and_seeds_matter(driver: Driver) -> None:
    answers = [
        driver.alone(driver.start(40, params, salt=salt), 12)
        for params, salt in [
            (SAMPLED, 0),
            (replace(SAMPLED, seed=12), 0),
            (SAMPLED, 1),
            (replace(SAMPLED, seed=-(2**63)), 0),
        ]
    ]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_penalties_reach_greedy_rows_too(driver: Driver) -> None:
    strong = replace(GREEDY, repetition_penalty=50.0, presence_penalty=2.0)
    plain, penalized = (driver.alone(driver.start(40, params), 12) for params in (GREEDY, strong))
    assert plain != penalized
    assert len(set(penalized)) >= len(set(plain))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_ends_an_answer_is_not_chosen_before_min_tokens(driver: Driver, temperature: float) -> None:
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=5)
    free = driver.start(20, params)
    endings = tuple(driver.alone(free, 12))
    mate = driver.start(20, salt=1)
    kept = driver.start(20, replace(params, min_tokens=6, ending_token_ids=endings))
    driver.steps(12, mate, kept)
    assert not set(kept.output_token_ids[:6]) & set(endings)
    assert kept.output_token_ids == driver.alone(kept, 12)
    assert mate.output_token_ids == driver.alone(mate, 12)
    late = driver.start(20, replace(params, min_tokens=3, ending_token_ids=(free.prompt_token_ids[0],)))
    assert len(driver.alone(late, 5)) == 5


def test_greedy_ignores_the_seed(driver: Driver) -> None:
    answers = [driver.alone(driver.start(40, replace(GREEDY, seed=seed)), 8) for seed in (0, 1)]
    assert answers[0] == answers[1]


def test_settings_that_leave_one_choice_are_greedy(driver: Driver) -> None:
    seq = driver.start(40, GREEDY)
    greedy = driver.alone(seq, 8)
    for params in (replace(SAMPLED, top_k=1), replace(SAMPLED, top_p=1e-9)):
        assert driver.alone(driver.start(40, params), 8) == greedy


@pytest.mark.parametrize("position", range(MAX_BATCH))
def test_a_released_slot_holds_nothing_of_its_last_user(driver: Driver, position: int) -> None:
    residents = [driver.start(2 * CUT, salt=salt) for salt in range(MAX_BATCH)]
    driver.steps(3, *residents)
    driver.release(residents[position])
    stay = [seq for seq in residents if seq is not residents[position]]
    heir = driver.start(11)
    driver.steps(4, heir, *stay)

    for seq in (heir, *stay):
        assert seq.output_token_ids == driver.alone(seq)


def test_releasing_an_unknown_sequence_is_ignored(driver: Driver) -> None:
    seq = driver.start(12)
    driver.step(seq)
    driver.backend.release([10**9])
    driver.steps(3, seq)
    assert seq.output_token_ids == driver.alone(seq)


def test_dead_rows_give_nothing_and_disturb_nobody(driver: Driver) -> None:
    finished, cut_off, live = driver.start(CUT + 2, SAMPLED), driver.start(2 * CUT), driver.start(7)
    driver.step(finished, (cut_off, CUT), live)
    driver.steps(2, finished, live)
    finished.state = cut_off.state = SequenceState.FINISHED
    driver.steps(3, live, dead=[finished, cut_off])
    late = driver.start(CUT + 1)
    driver.steps(2, live, late, dead=[finished, cut_off])

    for seq in (live, late, finished):
        assert seq.output_token_ids == driver.alone(seq)


def test_a_dead_row_overwrites_its_last_place_with_the_same(driver: Driver) -> None:
    seq, mate = driver.start(30), driver.start(3)
    driver.steps(2, seq, mate)
    driver.steps(3, mate, dead=[seq])
    driver.steps(2, seq, mate)
    assert seq.output_token_ids == driver.alone(seq)


def test_one_sequence_too_many_is_refused_and_harms_nobody(driver: Driver) -> None:
    residents = [driver.start(10 + salt) for salt in range(MAX_BATCH)]
    driver.steps(2, *residents)
    extra = driver.start(5)
    with pytest.raises(NO_ROOM):
        driver.step(*residents, extra)
    driver.steps(2, *residents)
    driver.release(residents[0])
    driver.step(extra, *residents[1:])

    for seq in (extra, *residents):
        assert seq.output_token_ids == driver.alone(seq)


def test_a_sequence_longer_than_a_slot_is_refused(driver: Driver) -> None:
    with pytest.raises(NO_ROOM):
        driver.step(driver.start(MAX_MODEL_LEN + 1))


def test_a_sequence_may_fill_its_slot_to_the_end(driver: Driver) -> None:
    seq, mate = driver.start(MAX_MODEL_LEN - 2), driver.start(1)
    driver.steps(3, seq, mate)
    assert seq.num_computed_tokens == MAX_MODEL_LEN
    with pytest.raises(NO_ROOM):
        driver.step(seq)
    driver.step(mate)
    assert mate.output_token_ids == driver.alone(mate)


def test_all_slots_of_full_length_fit_in_the_capacity_that_is_named(driver: Driver) -> None:
    num_full = min(MAX_BATCH, driver.backend.info.kv_capacity_tokens // MAX_MODEL_LEN)
    sequences = [driver.start(MAX_MODEL_LEN, salt=salt) for salt in range(num_full)]
    for seq in sequences:
        driver.step(seq)
    assert all(len(seq.output_token_ids) == 1 for seq in sequences)


def test_a_prompt_cancelled_between_its_chunks_leaves_nothing_behind(driver: Driver) -> None:
    mate, cancelled = driver.start(17), driver.start(3 * CUT + 1, SAMPLED)
    driver.step(mate, (cancelled, CUT))
    driver.step(mate, (cancelled, CUT))
    driver.release(cancelled)
    heir = driver.start(2 * CUT + 3, SAMPLED, salt=1)
    driver.step(mate, (heir, CUT))
    driver.steps(4, mate, heir)

    for seq in (mate, heir):
        assert seq.output_token_ids == driver.alone(seq)


def test_a_step_that_failed_may_be_given_again(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    held, mate, prompt = driver.start(30), driver.start(9), driver.start(2 * CUT + 5)
    driver.step(held, mate)
    for num_tokens in (CUT, CUT + 5):
        fail_next_step(driver.backend, monkeypatch)
        with pytest.raises(BackendError, match="planted"):
            driver.step(mate, (prompt, num_tokens))
        driver.step((prompt, num_tokens))  # one by one, as the engine gives them again
        driver.step(mate)
    driver.steps(2, held, mate, prompt)

    for seq in (held, mate, prompt):
        assert seq.output_token_ids == driver.alone(seq)


def test_gaps_between_slots_change_nothing(driver: Driver) -> None:
    residents = [driver.start(20 + salt, SAMPLED, salt=salt) for salt in range(MAX_BATCH)]
    driver.steps(2, *residents)
    driver.release(*residents[1:-1])
    ends = [residents[0], residents[-1]]
    driver.steps(9, *ends)  # long enough for a backend that closes gaps
    late = driver.start(CUT + 2, salt=9)
    driver.step(*ends, (late, CUT))
    driver.steps(3, *ends, late)
    driver.release(residents[0])
    driver.steps(9, late, residents[-1])

    for seq in (*ends, late):
        assert seq.output_token_ids == driver.alone(seq)
