"""Attention of all rows of a step in one or two calls of torch's flash attention, over the slots as they lie.

The operator is an argument, so that a plain one can stand in for it in tests.

Read in torch's source (flash_api.cpp, and block_info.h of FlashAttention 2):
 - with `seqused_k` given, `cum_seq_k[b]` is only the first key of entry b, so entries may lie in any order;
 - a causal mask is aligned to the last key;
 - with `max_q` 1 and grouped heads the query heads become rows, and the keys of an entry may be split over as
   many thread blocks as the batch leaves idle: bits then depend on the batch;
 - with `max_q` above 1 keys are never split, and a row's sums are taken in an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_CAPABILITY = (8, 0)
_MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class KeySpans:
    """Rows and keys of each entry, all int32 on the device; an entry's rows are the last of its positions."""

    row_starts: Tensor
    """`(B + 1,)`: entry b has the rows `row_starts[b] .. row_starts[b + 1] - 1`."""
    key_starts: Tensor
    """`(B + 1,)`: entry b's first KV position, counted through all slots; the last number means nothing."""
    lengths: Tensor
    """`(B,)`: positions that entry b may see, those of its own rows included."""
    max_rows: int
    """At least as many as the largest entry has; 1 chooses the kernel for decode rows alone."""


class AttentionOp(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, spans: KeySpans, max_len: int, scaling: float, window: int
    ) -> Tensor:
        """`q (T, heads, D)` over all slots' `k` and `v (slots * max_len, kv_heads, D)`; `window` 0 is none.

        Returns q's shape.
        """
        ...


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: KeySpans, max_len: int, scaling: float, window: int
) -> Tensor:
    """torch's own operator, for CUDA tensors of half precision."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        spans.row_starts,
        spans.key_starts,
        spans.max_rows,
        max_len,
        0.0,  # dropout
        True,  # causal
        False,  # no debug mask
        scale=scaling,
        window_size_left=window - 1 if window else None,  # it counts the keys before a row's own
        window_size_right=0 if window else None,
        seqused_k=spans.lengths,
    )[0]
    return out


@dataclass(frozen=True, slots=True)
class FlashPart:
    """Rows `first .. end - 1` of a step, attended in one call; the row numbers of `spans` begin with 0."""

    op: AttentionOp
    first: int
    end: int
    spans: KeySpans


class StepAttention(Protocol):
    """The attention of one step; `StepLayout` asks it instead of making its own calls."""

    def covers(self, q: Tensor, v_cache: Tensor) -> bool: ...

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float, window: int) -> Tensor:
        """`q (T, heads, D)`; caches `(slots, max_len, kv_heads, D)`; returns q's shape."""
        ...


@dataclass(frozen=True, slots=True)
class FlashStep:
    """A `StepAttention` with a call for each of its parts."""

    parts: Seq[FlashPart]
    """Side by side from row 0 on; rows behind them only pad the step."""
    dtypes: Seq[torch.dtype] = ()
    """What the operators of all parts take; empty: what torch's own takes."""

    def covers(self, q: Tensor, v_cache: Tensor) -> bool:
        return q.dtype in (self.dtypes or _DTYPES) and covers_heads(q.shape[2], v_cache.shape[3])

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float, window: int) -> Tensor:
        """Rows of no part get zeros."""
        k, v, max_len = k_cache.flatten(0, 1), v_cache.flatten(0, 1), k_cache.shape[1]
        outputs = [
            part.op(q[part.first : part.end], k, v, part.spans, max_len, scaling, window)
            for part in self.parts
        ]
        used = self.parts[-1].end
        if used < len(q):
            outputs.append(q.new_zeros(len(q) - used, *q.shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def covers(dtype: torch.dtype, head_dim: int, v_dim: int) -> bool:
    """True for what the operator takes on a device of at least `LEAST_CAPABILITY`."""
    return dtype in _DTYPES and covers_heads(head_dim, v_dim)


def covers_heads(head_dim: int, v_dim: int) -> bool:
    return head_dim == v_dim and head_dim % 8 == 0 and head_dim <= _MAX_HEAD_DIM


def decode_spans(slots: Tensor, positions: Tensor, max_len: int, *, max_rows: int = 1) -> KeySpans:
    """Spans of rows `(T,)` that are one entry each; computed on the device alone, so a graph can hold it."""
    row_starts = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
    key_starts = F.pad(slots * max_len, (0, 1)).to(torch.int32)
    return KeySpans(row_starts, key_starts, (positions + 1).to(torch.int32), max_rows)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: KeySpans, max_len: int, scaling: float, window: int
) -> Tensor:
    """The same in fp32, entry by entry: slow, and plain enough to be believed."""
    out = torch.empty_like(q)
    repeat = q.shape[1] // k.shape[1]
    starts, firsts, lengths = (t.tolist() for t in (spans.row_starts, spans.key_starts, spans.lengths))
    for row, end, first, length in zip(starts[:-1], starts[1:], firsts[:-1], lengths, strict=True):
        assert end - row <= spans.max_rows
        assert length <= max_len
        keys, values = (
            t[first : first + length].float().repeat_interleave(repeat, dim=1).transpose(0, 1) for t in (k, v)
        )
        scores = scaling * (q[row:end].float().transpose(0, 1) @ keys.transpose(1, 2))
        last = torch.arange(length - (end - row), length, device=q.device)[:, None]
        at = torch.arange(length, device=q.device)
        hidden = (at > last) | ((at <= last - window) if window else torch.zeros_like(at > last))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[row:end] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out
