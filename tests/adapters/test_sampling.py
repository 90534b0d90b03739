"""The draws are pinned: a change of them changes every sampled answer of every recorded run."""

from __future__ import annotations

import statistics
from collections import Counter

import numpy as np
import pytest

from adapters.base import SamplingParams
from adapters.sampling import mix64, sample_token, uniform_draw

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
