"""The rules of `adapters.sampling` for many rows at once, on the device where the logits are.

`sample_token` stays the reference: the order of the rules is the same, in fp64, and the draws are made on the
host, so a seed means the same everywhere. Sums over the vocabulary are taken in another order than NumPy's: a
draw within rounding (about 1e-15) of the border between two tokens may fall on the other one.

A device reads and writes memory here, and computes next to nothing: passes over the vocabulary are what
counts. The host sorts the rows by what their parameters ask for, so that a row pays for its own rules alone
and its path does not depend on the batch. Passes, in reads and writes of 8 bytes a token of the vocabulary,
for bf16 logits (67 MB a pass at 64 rows of 128 k tokens):

    rule                        passes  what for
    temperature alone              4.8  gather 0.5, maximum 0.2, scale 1.2, exp 2, block sums 1
    + min_p                        3.3  comparison 1.1, mask 2.1
    + top_k up to 1,024            6    radix select in bf16 1, ties 0.9, mask 3.8; top_p costs nothing then
    + top_p, or a larger top_k    29    sort of bf16 with indices 11, shares in that order 14, mask 4
    penalties                      2.3  a copy in fp64, counts in fp32; what is ranked is fp64 then, so that
                                        a maximum is 1 instead of 0.2 and a sort about 30
    penalties, greedy              4.8  gather, penalties, maximum and nothing else

No rule needs a sort unless a row has top_p without a small top_k. Nothing is read back by the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import IntEnum
from operator import add

import torch
from torch import Tensor

from adapters.base import LEAST_TEMPERATURE, SamplingParams, Sequence
from adapters.sampling import uniform_draws

NUM_INTS = 5
NUM_FLOATS = 7
_MAX_ELEMENTS = 1 << 25
"""Logits that are worked on together, which bounds the memory that sampling takes; a sort takes a quarter."""
_MAX_SELECTED = 1024
"""A larger top_k is a sort."""
_NO_TOP_K, _NO_TOP_P = 1 << 62, 2.0
"""Above any rank, and above any share even where rounding makes one of 1 larger."""
_BLOCK = 512
"""Tokens of the vocabulary whose weights are summed before one of them is looked for."""


def working_bytes(num_rows: int, vocab_size: int) -> int:
    """About what sampling `num_rows` takes while it works: 64 bytes for each logit that is sorted, 16 for
    each that is not."""
    num_elements = num_rows * vocab_size
    return max(16 * min(num_elements, _MAX_ELEMENTS), 64 * min(num_elements, _MAX_ELEMENTS // 4))


class Path(IntEnum):
    GREEDY = 0
    """With penalties; plainly greedy rows are not sampled."""
    ALL = 1
    """Every token may be drawn, up to min_p."""
    SELECT = 2
    """The largest top_k tokens are found without a sort."""
    SORT = 3


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows, next to each other in `RowSettings`, that take the same path."""

    num_rows: int
    path: Path
    penalties: bool
    min_p: bool
    top_k: int
    """The largest one."""
    num_tokens: int
    """Of the longest sequence."""


def needs_sampling(seq: Sequence) -> bool:
    """True unless the likeliest token is the answer."""
    return not seq.params.is_plain_greedy


def row_settings(
    rows: Seq[int], slots: Seq[int], sequences: Seq[Sequence]
) -> tuple[list[list[int]], list[list[float]], list[RowGroup]]:
    """What `RowSettings` is made of once it is on the device, in the order of the groups.

    `rows` are those of the logits.
    """
    kinds = [_kind(seq.params) for seq in sequences]
    if len(set(kinds)) > 1:
        order = sorted(range(len(kinds)), key=kinds.__getitem__)
        rows, slots = [rows[i] for i in order], [slots[i] for i in order]
        sequences, kinds = [sequences[i] for i in order], [kinds[i] for i in order]
    params = [seq.params for seq in sequences]
    num_prompt = [len(seq.prompt_token_ids) for seq in sequences]
    num_output = [len(seq.output_token_ids) + seq.num_pending_tokens for seq in sequences]
    num_tokens = [*map(add, num_prompt, num_output)]
    top_k = [p.top_k for p in params]
    groups, start = [], 0
    for kind, num_rows in Counter(kinds).items():  # in the order in which they come
        end = start + num_rows
        groups.append(RowGroup(num_rows, *kind, max(top_k[start:end]), max(num_tokens[start:end])))
        start = end
    ints = [list(rows), list(slots), num_prompt, num_tokens, [k or _NO_TOP_K for k in top_k]]
    floats = [
        [p.temperature for p in params],
        [p.top_p if p.top_p < 1.0 else _NO_TOP_P for p in params],
        [p.min_p for p in params],
        [p.repetition_penalty for p in params],
        [p.presence_penalty for p in params],
        [p.frequency_penalty for p in params],
        uniform_draws([p.seed for p in params], num_output),
    ]
    return ints, floats, groups


def _kind(params: SamplingParams) -> tuple[Path, bool, bool]:
    """The path of a row, whether it has penalties, and whether it has a min_p."""
    if params.temperature < LEAST_TEMPERATURE:
        return Path.GREEDY, True, False
    if 0 < params.top_k <= _MAX_SELECTED:
        path = Path.SELECT
    else:
        path = Path.SORT if params.top_k > 0 or params.top_p < 1.0 else Path.ALL
    return path, params.has_penalties, params.min_p > 0.0


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

    def part(self, start: int, end: int) -> RowSettings:
        """Rows `start` to `end`, each setting `(n, 1)`."""
        return RowSettings(*(getattr(self, name)[start:end, None] for name in self.__dataclass_fields__))


def sample_rows(logits: Tensor, settings: RowSettings, groups: Seq[RowGroup], known_ids: Tensor) -> Tensor:
    """Tokens `(n,)` for the rows that `settings` names.

    `known_ids (slots, max_len + 1)` holds the tokens so far of each slot; penalties alone read it.
    """
    tokens, start = [], 0
    for group in groups:
        end = start + group.num_rows
        width = max(logits.shape[1], group.num_tokens if group.penalties else 0)
        share = (4 if group.path is Path.SORT else 1) * (2 if group.penalties else 1)
        size = max(2, _MAX_ELEMENTS // (share * width))
        for first in range(start, end, size):
            rows = settings.part(first, min(first + size, end))
            tokens.append(_sample(logits, rows, group, known_ids))
        start = end
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def _sample(logits: Tensor, rows: RowSettings, group: RowGroup, known_ids: Tensor) -> Tensor:
    # Dividing by the temperature changes no order, so that scores are ranked as they are: bf16 where they
    # are the model's own, which sorts at a quarter of what fp64 costs.
    scores = logits[rows.row[:, 0]]
    if group.penalties:
        scores = _penalized(scores.double(), rows, known_ids[rows.slot[:, 0], : group.num_tokens])
    if group.path is Path.GREEDY:
        return scores.argmax(-1)
    top = scores.amax(-1, keepdim=True).double() / rows.temperature
    weights = _weights(scores, top, rows)
    if group.path is not Path.ALL:
        weights.masked_fill_(_left_out(scores, top, rows, group), 0.0)
    if group.min_p:
        weights.masked_fill_(weights < rows.min_p, 0.0)
    sums = _block_sums(weights)
    return _column_at(weights, sums, rows.draw * sums.sum(-1, keepdim=True))[:, 0]


def _weights(scores: Tensor, top: Tensor, rows: RowSettings) -> Tensor:
    """`exp(scores / temperature - top)` in fp64, in two passes."""
    return torch.addcdiv(-top, scores, rows.temperature).exp_()


def _left_out(scores: Tensor, top: Tensor, rows: RowSettings, group: RowGroup) -> Tensor:
    """True for each token that top_k or top_p leaves out. Of equal scores the first is ahead, as in NumPy.

    No ranks are scattered back: the lowest score that stays, and the last place where it does, say it all.
    """
    if group.path is Path.SORT:
        ranked, order = scores.sort(descending=True, stable=True)
    else:
        ranked, order = scores.topk(min(group.top_k, scores.shape[1])).values, None
    is_in = torch.arange(ranked.shape[1], device=scores.device) < rows.top_k
    shares = _weights(ranked, top, rows)
    if group.top_k:
        shares *= is_in
    shares /= shares.sum(-1, keepdim=True)
    is_in &= shares.cumsum(-1).sub_(shares) < rows.top_p
    count = is_in.sum(-1, keepdim=True).clamp_(min=1)
    border = ranked.gather(1, count - 1)
    ties = scores == border
    if order is None:
        # Which of several equal scores a selection returns is not said: they are counted in the vocabulary.
        num_ties = count - (ranked > border).sum(-1, keepdim=True)
        last = _column_at(ties, _block_sums(ties), num_ties - 1)
    else:
        last = order.gather(1, count - 1)
    is_behind = torch.arange(scores.shape[1], device=scores.device) > last
    return (scores < border).logical_or_(ties.logical_and_(is_behind))


def _block_sums(numbers: Tensor) -> Tensor:
    """The sums `(n, blocks)` of every `_BLOCK` columns."""
    num_rows, num_columns = numbers.shape
    num_whole, rest = divmod(num_columns, _BLOCK)
    end = num_columns - rest
    sums = numbers[:, :end].view(num_rows, num_whole, _BLOCK).sum(-1)
    return torch.cat([sums, numbers[:, end:].sum(-1, keepdim=True)], dim=1) if rest else sums


def _column_at(numbers: Tensor, sums: Tensor, target: Tensor) -> Tensor:
    """The first column `(n, 1)` at which the running sum of `numbers (n, columns)` is above `target (n, 1)`.

    `sums` are the block sums: a running sum over one block of the vocabulary is enough.
    """
    block, start = _first_above(sums, target)
    at = block * _BLOCK + torch.arange(_BLOCK, device=numbers.device)
    inside = numbers.gather(1, at.clamp(max=numbers.shape[1] - 1)).to(sums.dtype)
    inside.masked_fill_(at >= numbers.shape[1], 0)
    # Rounding can put the target a little before the start of the block.
    column, _ = _first_above(inside, (target - start).clamp_(min=0))
    return block * _BLOCK + column


def _first_above(numbers: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first column `(n, 1)` whose running sum is above `target`, and the sum before it.

    Never one whose number is 0: a device's running sums are not quite monotone, so a target can lie between
    two that should be equal. Where rounding puts the target at the very end, the last one above 0 is meant.
    """
    ends, num_columns = numbers.cumsum(-1), numbers.shape[1]
    at = torch.arange(num_columns, device=numbers.device)
    key = torch.where(ends > target, 2 * num_columns - at, at).masked_fill_(numbers <= 0, -1)
    column = key.argmax(-1, keepdim=True)
    return column, ends.gather(1, column) - numbers.gather(1, column)


def _penalized(scores: Tensor, rows: RowSettings, ids: Tensor) -> Tensor:
    """Changes `scores` in place where there is a known token, and returns them.

    `ids (n, positions)`: the row's tokens by position; the first `num_tokens` mean something.
    """
    at = torch.arange(ids.shape[1], device=ids.device)
    is_known = at < rows.num_tokens
    is_output = is_known & (at >= rows.num_prompt)
    # A token that is there several times gets the same score each time, so any order of writing will do.
    ids = ids.where(is_known, ids[:, :1])
    counts = torch.zeros_like(scores, dtype=torch.float32).scatter_add_(1, ids, is_output.float())
    counts = counts.gather(1, ids).double()
    old = scores.gather(1, ids)
    new = torch.where(old > 0, old / rows.repetition, old * rows.repetition)
    loss = rows.presence + rows.frequency * counts
    return scores.scatter_(1, ids, new.where(counts == 0, new - loss))
