"""The rules of `adapters.sampling` for many rows at once, on the device where the logits are.

`sample_token` stays the reference: the order of the rules is the same, in fp64, and the draws are made on the
host, so a seed means the same everywhere. Sums over the vocabulary are taken in another order than NumPy's: a
draw within rounding (about 1e-16) of the border between two tokens may fall on the other one.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base import LEAST_TEMPERATURE, Sequence
from adapters.sampling import uniform_draw

NUM_INTS = 5
NUM_FLOATS = 7
_MAX_ELEMENTS = 1 << 23
"""Logits that are worked on together, which bounds the memory that sampling takes."""


def needs_sampling(seq: Sequence) -> bool:
    """True unless the likeliest token is the answer."""
    return not seq.params.is_plain_greedy


def row_settings(
    rows: Seq[int], slots: Seq[int], sequences: Seq[Sequence]
) -> tuple[list[list[int]], list[list[float]]]:
    """What `RowSettings` is made of once it is on the device; `rows` are those of the logits."""
    ints = [
        list(rows),
        list(slots),
        [seq.num_prompt_tokens for seq in sequences],
        [seq.num_tokens for seq in sequences],
        [seq.params.top_k for seq in sequences],
    ]
    params = [seq.params for seq in sequences]
    draws = [uniform_draw(s.params.seed, s.num_tokens - s.num_prompt_tokens) for s in sequences]
    floats = [
        [p.temperature for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [p.repetition_penalty for p in params],
        [p.presence_penalty for p in params],
        [p.frequency_penalty for p in params],
        draws,
    ]
    return ints, floats


@dataclass(frozen=True, slots=True)
class RowSettings:
    """One number a row in each `(n,)`, int64 and then float64."""

    row: Tensor
    slot: Tensor
    num_prompt: Tensor
    num_tokens: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    draw: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.__dataclass_fields__]


def sample_rows(logits: Tensor, settings: RowSettings, known_ids: Tensor, *, penalties: bool) -> Tensor:
    """Tokens `(n,)` for the rows that `settings` names.

    `known_ids (slots, max_len + 1)` holds the tokens so far of each slot; it is read only with `penalties`.
    """
    num_rows = max(2, _MAX_ELEMENTS // logits.shape[1])
    parts = zip(*(torch.split(t, num_rows) for t in settings.tensors), strict=True)
    tokens = [_sample(logits, RowSettings(*part), known_ids, penalties) for part in parts]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def _sample(logits: Tensor, rows: RowSettings, known_ids: Tensor, penalties: bool) -> Tensor:
    scores = logits[rows.row].double()
    if penalties:
        scores = _penalized(scores, rows, known_ids[rows.slot])
    likeliest = scores.argmax(-1)
    is_greedy = rows.temperature < LEAST_TEMPERATURE
    scores = scores / torch.where(is_greedy, 1.0, rows.temperature)[:, None]
    rank = _ranks(scores)
    top_k = torch.where(rows.top_k > 0, rows.top_k, scores.shape[1])
    scores = scores.masked_fill(rank >= top_k[:, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    ranked, order = weights.sort(descending=True, stable=True)
    ranked = ranked / weights.sum(-1, keepdim=True)
    before = ranked.cumsum(-1) - ranked
    beyond = (before >= rows.top_p[:, None]) & (rows.top_p < 1.0)[:, None]
    beyond = torch.zeros_like(beyond).scatter_(1, order, beyond)
    weights = weights.masked_fill(beyond | (weights < rows.min_p[:, None]), 0.0)
    cumulative = weights.cumsum(-1)
    target = rows.draw[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.where(is_greedy, likeliest, torch.minimum(drawn, last))


def _ranks(scores: Tensor) -> Tensor:
    """The rank of each score in falling order; of equal ones the first is ahead."""
    order = scores.argsort(descending=True, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def _penalized(scores: Tensor, rows: RowSettings, ids: Tensor) -> Tensor:
    """`ids (n, max_len + 1)`: the row's tokens by position; the first `num_tokens` mean something."""
    at = torch.arange(ids.shape[1], device=ids.device)[None]
    is_known = at < rows.num_tokens[:, None]
    is_output = is_known & (at >= rows.num_prompt[:, None])
    ids = ids.where(is_known, 0)
    zeros = torch.zeros_like(scores)
    seen = zeros.scatter_add(1, ids, is_known.double()) > 0
    counts = zeros.scatter_add(1, ids, is_output.double())
    penalty = rows.repetition[:, None]
    penalized = torch.where(scores > 0, scores / penalty, scores * penalty)
    scores = scores.where(~seen, penalized)
    loss = rows.presence[:, None] + rows.frequency[:, None] * counts
    return scores.where(counts == 0, scores - loss)
