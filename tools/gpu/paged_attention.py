"""torch's own flash attention as an attention of transformers' continuous batching.

transformers takes flash attention from the flash-attn package only. Without it, a step's rows are masked
against everything in the cache, which is no fair yardstick. Here a step of decode rows alone reads the cache
in place. For that, a block of the cache must hold a whole sequence, so that its keys lie side by side. Any
other step gathers its keys first, as transformers does with flash-attn.
"""

from __future__ import annotations

import inspect
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.torch_backend.model.flash_attention import (
    LEAST_CAPABILITY,
    AttentionOp,
    KeySpans,
    flash_attention,
    plain_attention,
)

_OWN = "paged|torch_flash"
"""No number in it: transformers would look for the package of this version."""
_PLAIN = "paged|plain_flash"


def choose_attention(model: Any) -> str:
    """Give `model` the best paged attention that there is; returns its name.

    On a CPU a plain one takes the operator's place, for tests.
    """
    from transformers import AttentionInterface
    from transformers.utils import import_utils

    if model.device.type == "cpu":
        name, op = _PLAIN, plain_attention
    elif import_utils.is_flash_attn_3_available():
        model.set_attn_implementation("paged|flash_attention_3")
        return "paged|flash_attention_3"
    elif import_utils.is_flash_attn_2_available():
        model.set_attn_implementation("paged|flash_attention_2")
        return "paged|flash_attention_2"
    elif torch.cuda.get_device_capability(model.device) >= LEAST_CAPABILITY:
        name, op = _OWN, flash_attention
    else:
        model.set_attn_implementation("paged|sdpa")
        return "paged|sdpa"
    for known_as in (name, name.removeprefix("paged|")):  # by the version of transformers
        AttentionInterface.register(known_as, partial(attend, op))
    # `set_attn_implementation` would ask for the package, since the name says flash.
    model.config._attn_implementation_internal = name
    return name


def reads_in_place(name: str) -> bool:
    """True for ours, where the cache of this version of transformers is laid out for it."""
    return name in (_OWN, _PLAIN) and updates_by_index()


@once
def updates_by_index() -> bool:
    """True for the cache of transformers up to 5.17 or so, False for that of 5.23."""
    from transformers.generation.continuous_batching import PagedAttentionCache

    return "read_index" in inspect.signature(PagedAttentionCache.update).parameters


def is_fair(name: str) -> bool:
    return name.startswith("paged|flash_attention_") or name == _OWN


def attend(
    op: AttentionOp,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cache: Any,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Any,
    block_table: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`q (1, heads, T, D)`, `k` and `v (1, kv_heads, T, D)` of this step; returns `(T, heads, D)`."""
    rows = q[0].transpose(0, 1).contiguous()
    if block_table is not None:
        return _in_place(op, module.layer_idx, rows, k, v, scaling, cache, cu_seq_lens_k, block_table), None
    states = {"key_states": k, "value_states": v, "layer_idx": module.layer_idx}
    if updates_by_index():
        keys, values = cache.update(
            **states, read_index=others["read_index"], write_index=others["write_index"]
        )
        max_q, max_k = others["max_seqlen_q"], others["max_seqlen_k"]
    else:
        # It chooses what belongs to the layer, and leaves that in the dictionary.
        others["cu_seq_lens_k"] = cu_seq_lens_k
        keys, values = cache.update(**states, kwargs=others)
        keys, values = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        cu_seq_lens_k, max_q, max_k = (
            others[name] for name in ("cu_seq_lens_k", "max_length_q", "max_length_k")
        )
    spans = KeySpans(cu_seq_lens_q.int(), cu_seq_lens_k.int(), cu_seq_lens_k.diff().int(), int(max_q))
    return op(rows, keys.contiguous(), values.contiguous(), spans, int(max_k), scaling, 0), None


def _in_place(
    op: AttentionOp,
    layer_idx: int,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    cache: Any,
    cu_seq_lens_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """One row a sequence, whose block holds all its keys."""
    group, layer = cache.layer_index_to_group_indices[layer_idx]
    keys, values = cache.key_cache[layer], cache.value_cache[layer]
    block = block_table[group][:, 0].long()
    # Rows that only pad the step have no block.
    starts = torch.where(block < 0, cache.write_trash_index, block * cache.block_size)
    lengths = cu_seq_lens_k.diff().clamp(min=1)
    at = starts + lengths - 1
    keys.index_copy_(0, at, k[0].transpose(0, 1))
    values.index_copy_(0, at, v[0].transpose(0, 1))
    row_starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
    spans = KeySpans(row_starts, F.pad(starts, (0, 1)).int(), lengths.int(), 1)
    return op(rows, keys, values, spans, cache.block_size, scaling, 0)
