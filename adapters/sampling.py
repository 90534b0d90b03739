"""The random numbers of sampling and the rule that turns one into a token, the same in every backend.

A draw is a hash of a sequence's seed and the index of the output token (0 for its first). There is no
generator with a state to share or advance, so a draw cannot depend on who else is in the batch, on how often
a step is repeated, or on which device it runs.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from adapters.base import LEAST_TEMPERATURE, SamplingParams, Sequence

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_FEWEST_AT_ONCE = 32
"""Below this, NumPy's calls take longer than the draws one by one."""


def mix64(value: int) -> int:
    """Scramble 64 bits so that every input bit changes half of the output bits on average.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform_draw(seed: int, index: int) -> float:
    """The `index`-th draw of `seed`, uniform in [0, 1) with 53 random bits; any integer is a seed."""
    return (mix64(mix64(seed) + (index + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53


def uniform_draws(seeds: Seq[int], indices: Seq[int]) -> list[float]:
    """`uniform_draw` of each seed and index, many at once."""
    if len(seeds) < _FEWEST_AT_ONCE:
        return [*map(uniform_draw, seeds, indices)]
    states = _mix64_each(np.array([seed & _MASK for seed in seeds], dtype=np.uint64))
    states += (np.array(indices, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN_GAMMA)
    draws: list[float] = ((_mix64_each(states) >> np.uint64(11)) * 2.0**-53).tolist()
    return draws


def _mix64_each(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`mix64` of each of them; arithmetic of this type is modulo 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sample_token(
    logits: npt.NDArray[np.float32],
    params: SamplingParams,
    index: int,
    *,
    prompt_token_ids: Seq[int] = (),
    output_token_ids: Seq[int] = (),
) -> int:
    """Choose the `index`-th output token from `logits (vocabulary,)`; temperature 0, or nearly, takes the
    likeliest.

    What `min_tokens` bans first, then penalties (they need the tokens so far), then temperature, then top_k,
    then top_p over what top_k left, then min_p (the order of Hugging Face's samplers), then the inverse of
    the cumulative distribution at the draw.
    """
    scores = logits.astype(np.float64)
    banned = params.banned_at(index)
    if banned:
        scores[list(banned)] = -np.inf
    if params.has_penalties:
        penalize(scores, params, prompt_token_ids, output_token_ids)
    if params.temperature < LEAST_TEMPERATURE:
        return int(scores.argmax())
    scores /= params.temperature
    if 0 < params.top_k < len(scores):
        scores[np.argsort(-scores, kind="stable")[params.top_k :]] = -np.inf
    weights = np.exp(scores - scores.max())
    if params.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        ranked = weights[order] / weights.sum()
        before = np.cumsum(ranked) - ranked
        weights[order[before >= params.top_p]] = 0.0
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0  # the likeliest one weighs 1
    cumulative = np.cumsum(weights)
    drawn = np.searchsorted(cumulative, uniform_draw(params.seed, index) * cumulative[-1], side="right")
    # Rounding can put the draw at the very end; the last token that has any weight is meant then.
    return int(min(drawn, np.flatnonzero(weights)[-1]))


def choose_token(logits: npt.NDArray[np.float32], seq: Sequence) -> int:
    """The next token of `seq` from its `logits (vocabulary,)`, greedy or drawn, with all its penalties."""
    return sample_token(
        logits,
        seq.params,
        len(seq.output_token_ids),
        prompt_token_ids=seq.prompt_token_ids,
        output_token_ids=seq.output_token_ids,
    )


def penalize(
    scores: npt.NDArray[np.float64],
    params: SamplingParams,
    prompt_token_ids: Seq[int],
    output_token_ids: Seq[int],
) -> None:
    """Change `scores (vocabulary,)` in place by what was said already.

    The repetition penalty divides positive scores (and multiplies negative ones) of tokens in the prompt or
    the output; the other two subtract, for tokens of the output alone, once and for each time it came.
    Source: CTRL (Keskar et al., 2019); the presence and frequency penalties of the OpenAI API.
    """
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array([*prompt_token_ids, *output_token_ids], dtype=np.int64))
        old, penalty = scores[seen], params.repetition_penalty
        scores[seen] = np.where(old > 0, old / penalty, old * penalty)
    if output_token_ids and (params.presence_penalty or params.frequency_penalty):
        said, counts = np.unique(np.array(output_token_ids, dtype=np.int64), return_counts=True)
        scores[said] -= params.presence_penalty + params.frequency_penalty * counts
