"""torch's own flash attention as an attention of transformers' continuous batching.

transformers takes flash attention from the flash-attn package only. Without it, a step's rows are masked
against everything in the cache, which is no fair yardstick. Here a step of decode rows alone reads the cache
in place. For that, a block of the cache must hold a whole sequence, so that its keys lie side by side. Any
other step gathers its keys first, as transformers does with flash-attn.
"""

from __future__ import annotations

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
    AttentionInterface.register(name, partial(attend, op))
    # `set_attn_implementation` would ask for the package, since the name says flash.
    model.config._attn_implementation_internal = name
    return name


def is_ours(name: str) -> bool:
    return name in (_OWN, _PLAIN)


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
    cu_seq_lens_k: Tensor,
    block_table: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`q (1, heads, T, D)`, `k` and `v (1, kv_heads, T, D)` of this step; returns `(T, heads, D)`."""
    rows = q[0].transpose(0, 1).contiguous()
    lengths = cu_seq_lens_k.diff()
    if block_table is None:
        keys, values = cache.update(
            key_states=k,
            value_states=v,
            layer_idx=module.layer_idx,
            read_index=others["read_index"],
            write_index=others["write_index"],
        )
        # Two names, by the version of transformers.
        max_q, max_k = (others.get(f"max_seqlen_{x}", others.get(f"max_length_{x}")) for x in "qk")
        assert max_q is not None
        assert max_k is not None
        spans = KeySpans(cu_seq_lens_q.int(), cu_seq_lens_k.int(), lengths.int(), int(max_q))
        return op(rows, keys.contiguous(), values.contiguous(), spans, int(max_k), scaling, 0), None
    group, layer = cache.layer_index_to_group_indices[module.layer_idx]
    keys, values = cache.key_cache[layer], cache.value_cache[layer]
    block = block_table[group][:, 0].long()
    # Rows that only pad the step have no block.
    starts = torch.where(block < 0, cache.write_trash_index, block * cache.block_size)
    lengths = lengths.clamp(min=1)
    at = starts + lengths - 1
    keys.index_copy_(0, at, k[0].transpose(0, 1))
    values.index_copy_(0, at, v[0].transpose(0, 1))
    row_starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
    spans = KeySpans(row_starts, F.pad(starts, (0, 1)).int(), lengths.int(), 1)
    return op(rows, keys, values, spans, cache.block_size, scaling, 0), None
