"""The random numbers of sampling and the rule that turns one into a token, the same in every backend.

A draw is a hash of a sequence's seed and the index of the output token (0 for its first). There is no
generator with a state to share or advance, so a draw cannot depend on who else is in the batch, on how often
a step is repeated, or on which device it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from adapters.base import LEAST_TEMPERATURE, SamplingParams, Sequence, StepOutput, TokenLogprobs

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_FEWEST_AT_ONCE = 32
"""Below this, NumPy's calls take longer than the draws one by one."""
_BOUNDS = tuple(2.0**-bits for bits in (4, 8, 12, 16, 24))
"""Weights, as shares of the largest, above which those that `top_p` keeps are looked for."""
_ROUNDING = 1e-9
"""More than the sums of a vocabulary can be off."""


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
        token_ids = _top_k(scores, params.top_k)
        scores = scores[token_ids]
    else:
        token_ids = np.arange(len(scores))
    weights = np.exp(scores - scores.max())
    if params.top_p < 1.0:
        kept = _nucleus(weights, params.top_p)
        token_ids, weights = token_ids[kept], weights[kept]
    if params.min_p > 0.0:
        kept = np.flatnonzero(~(weights < params.min_p))  # the likeliest one weighs 1
        token_ids, weights = token_ids[kept], weights[kept]
    cumulative = np.cumsum(weights)
    drawn = np.searchsorted(cumulative, uniform_draw(params.seed, index) * cumulative[-1], side="right")
    if drawn == len(weights):
        # Rounding can put the draw at the very end; the last token that has any weight is meant then.
        drawn = np.flatnonzero(weights)[-1]
    return int(token_ids[drawn])


def _top_k(scores: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """Where the `count` largest scores stand, in rising order; of equal ones the first count."""
    least = np.partition(scores, -count)[-count]
    kept = np.flatnonzero(~(scores < least))  # so that NaN, which no model should give, raises nothing
    if len(kept) > count:
        equal = np.flatnonzero(scores[kept] == least)
        kept = np.delete(kept, equal[count - len(kept) :])
    return kept


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Where the fewest of the largest weights that make up `top_p` of all stand, in rising order.

    Sorting a whole vocabulary takes milliseconds. So only the weights above a bound are sorted, once they are
    sure to hold all that is wanted. The sort is stable: it gives them the order that they have among all.
    """
    total = weights.sum()
    candidates = np.arange(len(weights))
    for least in _BOUNDS:
        likely = np.flatnonzero(weights >= least)
        if weights[likely].sum() >= (top_p + _ROUNDING) * total:
            candidates = likely
            break
    ranks = np.argsort(-weights[candidates], kind="stable")
    ranked = weights[candidates[ranks]] / total
    before = np.cumsum(ranked) - ranked
    return np.sort(candidates[ranks[~(before >= top_p)]])


def choose_token(logits: npt.NDArray[np.float32], seq: Sequence) -> int:
    """The next token of `seq` from its `logits (vocabulary,)`, greedy or drawn, with all its penalties."""
    return sample_token(
        logits,
        seq.params,
        len(seq.output_token_ids),
        prompt_token_ids=seq.prompt_token_ids,
        output_token_ids=seq.output_token_ids,
    )


def step_outputs(
    sequences: Seq[Sequence], tokens: Seq[int], logits_of: Callable[[int], npt.NDArray[np.float32]]
) -> list[StepOutput]:
    """The chosen token of each row; `logits_of` a row are asked for only where a sequence wants logprobs."""
    outputs = [StepOutput(seq.seq_id, [token]) for seq, token in zip(sequences, tokens, strict=True)]
    for row, seq in enumerate(sequences):
        if seq.params.num_logprobs is not None:
            outputs[row].logprobs = [token_logprobs(logits_of(row), tokens[row], seq.params.num_logprobs)]
    return outputs


def sampled_outputs(logits: npt.NDArray[np.float32], sampled: Seq[tuple[int, Sequence]]) -> list[StepOutput]:
    """Of the sequences of some rows of `logits (rows, vocabulary)`, each with its row."""
    likeliest = logits.argmax(-1)
    tokens = [
        int(likeliest[row]) if seq.params.is_plain_greedy else choose_token(logits[row], seq)
        for row, seq in sampled
    ]
    return step_outputs([seq for _, seq in sampled], tokens, lambda place: logits[sampled[place][0]])


def token_logprobs(logits: npt.NDArray[np.float32], token_id: int, count: int) -> TokenLogprobs:
    """Of one chosen token and of the `count` likeliest, before penalties, temperature and filters."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    likeliest = _top_k(scores, min(count, len(scores))) if count else np.empty(0, dtype=np.intp)
    ranked = likeliest[np.argsort(-scores[likeliest], kind="stable")]
    return float(scores[token_id]), [(int(i), float(scores[i])) for i in ranked]


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
