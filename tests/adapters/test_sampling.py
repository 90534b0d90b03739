"""The draws are pinned: a change of them changes every sampled answer of every recorded run."""

from __future__ import annotations

import statistics
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from adapters.base import SamplingParams, Sequence
from adapters.sampling import (
    choose_token,
    mix64,
    penalize,
    sample_token,
    token_logprobs,
    uniform_draw,
    uniform_draws,
)

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


@pytest.mark.parametrize(
    ("value", "mixed"),
    [(0, 0), (1, 0x5692161D100B05E5), (0x9E3779B97F4A7C15, 0xE220A8397B1DCDAF), (-1, 0xB4D055FCF2CBBD7B)],
)
def test_mix64_is_the_splitmix_finalizer(value: int, mixed: int) -> None:
    assert mix64(value) == mixed


def test_draws_of_seed_zero_are_the_published_stream() -> None:
    # First outputs of SplitMix64 from state 0, of which a draw keeps the upper 53 bits.
    stream = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniform_draw(0, index) for index in range(3)] == [(bits >> 11) / 2**53 for bits in stream]


def test_many_draws_at_once_are_the_same_draws() -> None:
    seeds, indices = [0, 5, -1, 2**64 - 1, 2**70 + 3, -(2**65)] * 10, [0, 1, 4, 2**31, 7, 0] * 10
    want = [uniform_draw(seed, index) for seed, index in zip(seeds, indices, strict=True)]
    for count in (1, 6, 31, 32, 60):
        assert uniform_draws(seeds[:count], indices[:count]) == want[:count]


def test_a_seed_is_taken_modulo_64_bits() -> None:
    assert uniform_draw(-1, 4) == uniform_draw(2**64 - 1, 4)


@pytest.mark.parametrize(
    "draws",
    [
        pytest.param([uniform_draw(5, index) for index in range(4000)], id="along a sequence"),
        pytest.param([uniform_draw(seed, 0) for seed in range(4000)], id="over neighbouring seeds"),
        pytest.param([uniform_draw(index, index) for index in range(4000)], id="along the diagonal"),
    ],
)
def test_draws_are_uniform(draws: list[float]) -> None:
    assert all(0 <= draw < 1 for draw in draws)
    counts = [0] * 16
    for draw in draws:
        counts[int(draw * 16)] += 1
    expected = len(draws) / 16
    chi_squared = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_squared < 37.7  # 99.9 % of uniform samples, 15 degrees of freedom
    assert abs(statistics.correlation(draws[:-1], draws[1:])) < 0.06


@pytest.mark.parametrize(
    ("params", "shares"),
    [
        (SamplingParams(temperature=1.0), [0.1, 0.4, 0.2, 0.3]),
        (SamplingParams(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (SamplingParams(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (SamplingParams(temperature=1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (SamplingParams(temperature=1.0, top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
        (SamplingParams(temperature=1.0, top_k=99, top_p=1e-9), [0, 1, 0, 0]),
        (SamplingParams(temperature=1e-4), [0, 1, 0, 0]),
    ],
)
def test_sampled_tokens_follow_the_distribution(params: SamplingParams, shares: list[float]) -> None:
    num_draws = 4000
    counts = Counter(sample_token(LOGITS, params, index) for index in range(num_draws))
    for token_id, share in enumerate(shares):
        assert (counts[token_id] == 0) == (share == 0)
        assert counts[token_id] / num_draws == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("params", "shares"),
    [
        (SamplingParams(temperature=1.0, min_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (SamplingParams(temperature=1.0, min_p=1.0), [0, 1, 0, 0]),
        (SamplingParams(temperature=0.5, min_p=0.3), [0, 16 / 25, 0, 9 / 25]),
        (SamplingParams(temperature=1.0, top_k=3, min_p=0.1), [0, 4 / 9, 2 / 9, 3 / 9]),
    ],
)
def test_min_p_is_a_share_of_the_likeliest(params: SamplingParams, shares: list[float]) -> None:
    counts = Counter(sample_token(LOGITS, params, index) for index in range(6000))
    for token_id, share in enumerate(shares):
        assert counts[token_id] / 6000 == pytest.approx(share, abs=0.025)
        assert share > 0 or counts[token_id] == 0


PENALIZED = np.array([4.0, 2.0, -2.0, 0.0, 1.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # Prompt tokens 0 and 2, output tokens 1, 1, 4.
        (SamplingParams(repetition_penalty=2.0), [2.0, 1.0, -4.0, 0.0, 0.5]),
        (SamplingParams(repetition_penalty=0.5), [8.0, 4.0, -1.0, 0.0, 2.0]),
        (SamplingParams(presence_penalty=0.5), [4.0, 1.5, -2.0, 0.0, 0.5]),
        (SamplingParams(frequency_penalty=0.5), [4.0, 1.0, -2.0, 0.0, 0.5]),
        (SamplingParams(presence_penalty=1.0, frequency_penalty=-0.5), [4.0, 2.0, -2.0, 0.0, 0.5]),
        (SamplingParams(repetition_penalty=2.0, presence_penalty=1.0), [2.0, 0.0, -4.0, 0.0, -0.5]),
        (SamplingParams(), [4.0, 2.0, -2.0, 0.0, 1.0]),
    ],
)
def test_penalties_by_hand(params: SamplingParams, expected: list[float]) -> None:
    scores = PENALIZED.astype(np.float64)
    penalize(scores, params, [0, 2], [1, 1, 4])
    assert scores.tolist() == expected


def test_penalties_reach_greedy_choices_and_leave_the_logits_alone() -> None:
    logits = PENALIZED.copy()
    seq = Sequence(1, [0], SamplingParams(repetition_penalty=4.0))
    assert choose_token(logits, seq) == 1
    seq.output_token_ids.append(1)
    assert choose_token(logits, seq) == 0  # 4 / 4 and 2 / 4 against the 1 of token 4: the first of equals
    assert logits.tolist() == PENALIZED.tolist()


def test_without_penalties_the_tokens_so_far_change_nothing() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5)
    for index in range(200):
        plain = sample_token(LOGITS, params, index)
        assert plain == sample_token(LOGITS, params, index, prompt_token_ids=[1], output_token_ids=[0, 3])


def sorted_choice(logits: npt.NDArray[np.float32], params: SamplingParams, index: int) -> int:
    """The rule of `sample_token` as it reads, with a sort of the whole vocabulary."""
    scores = logits.astype(np.float64) / params.temperature
    if params.top_k:
        scores[np.argsort(-scores, kind="stable")[params.top_k :]] = -np.inf
    weights = np.exp(scores - scores.max())
    order = np.argsort(-weights, kind="stable")
    ranked = weights[order] / weights.sum()
    weights[order[np.cumsum(ranked) - ranked >= params.top_p]] = 0.0
    weights[weights < params.min_p] = 0.0
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, uniform_draw(params.seed, index) * cumulative[-1], side="right"))


@pytest.mark.parametrize("kind", ["peaked", "even", "with equals", "alone"])
def test_a_real_vocabulary_is_not_sorted_and_gives_the_tokens_of_a_sort(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1 if kind == "even" else 3, 49_152).astype(np.float32)
    logits[rng.integers(0, len(logits), 30)] += 0 if kind == "even" else 9
    if kind == "with equals":
        logits = np.round(logits)
    if kind == "alone":
        logits[:] = -np.inf
        logits[7] = 0
    sizes: list[int] = []
    sort = np.argsort
    monkeypatch.setattr(
        "adapters.sampling.np.argsort", lambda a, **how: (sizes.append(len(a)), sort(a, **how))[1]
    )
    for index in range(40):
        params = SamplingParams(
            temperature=float(rng.choice([0.3, 0.8, 1.5])),
            top_k=int(rng.choice([0, 1, 50, 5000])),
            top_p=float(rng.choice([0.1, 0.9, 0.999, 1.0])),
            min_p=float(rng.choice([0.0, 0.02, 0.3])),
            seed=index,
        )
        chosen = sample_token(logits, params, index)
        num_sorted = max(sizes, default=0)
        assert chosen == sorted_choice(logits, params, index), params
        sizes.clear()
        if kind == "peaked" and params.temperature < 1 and params.top_p < 0.99:
            assert num_sorted < 2_000


def test_scores_that_are_no_numbers_raise_nothing() -> None:
    broken = np.full(64, np.nan, dtype=np.float32)
    for params in (SamplingParams(temperature=1.0, top_k=5, top_p=0.5, min_p=0.1), SamplingParams()):
        assert 0 <= sample_token(broken, params, 0) < 64


def test_logprobs_by_hand() -> None:
    own, top = token_logprobs(LOGITS, 2, 2)
    assert own == pytest.approx(np.log(0.2))
    assert [(i, pytest.approx(p)) for i, p in top] == [(1, np.log(0.4)), (3, np.log(0.3))]
    assert token_logprobs(LOGITS, 0, 0)[1] == []
    assert len(token_logprobs(LOGITS, 0, 20)[1]) == 4


def test_rows_of_a_torch_batch_are_chosen_one_by_one() -> None:
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from adapters.torch_backend.sampling import choose_tokens, find_likeliest

    params = [
        SamplingParams(),
        SamplingParams(repetition_penalty=4.0),
        SamplingParams(temperature=1.0, min_p=0.3, presence_penalty=0.5, seed=3),
    ]
    sequences = [Sequence(i, [0], one, output_token_ids=[1, 4]) for i, one in enumerate(params)]
    logits = torch.tensor(np.stack([PENALIZED] * 4))
    likeliest = find_likeliest(logits[:3], None)
    assert likeliest == [int(PENALIZED.argmax())] * 3
    assert choose_tokens(logits, sequences, likeliest) == [choose_token(PENALIZED, seq) for seq in sequences]


def test_a_temperature_near_zero_is_greedy_and_overflows_nothing() -> None:
    with np.errstate(all="raise"):
        assert {sample_token(LOGITS, SamplingParams(temperature=5e-324), index) for index in range(50)} == {1}
