"""Triton kernels of a decode step: the small parts between the matrix products, each in one launch.

No kernel looks at more than one row, and the keys of a row are cut into parts of a fixed size that are joined
in a fixed order. A row therefore has the same bits alone and in any batch.

Caches are `(slots, max_len, kv_heads, D)` and contiguous. `D` is the size of a head and `DP` the next power
of two; the numbers beyond `D` are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm(x, weight, out, eps, N: tl.constexpr, NP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid `(rows,)`; rows of `N` numbers. Rounds before the weight, as transformers' LlamaRMSNorm does."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    ok = i < N
    a = tl.load(x + row * N + i, mask=ok, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(a * a, 0) / N + eps)
    w = tl.load(weight + i, mask=ok, other=0.0)
    y = (a * scale).to(w.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(out + row * N + i, y.to(out.dtype.element_ty), mask=ok)


@triton.jit  # type: ignore[untyped-decorator]
def rotate_and_store(  # type: ignore[no-untyped-def]
    qkv, cos, sin, slots, positions, k_cache, v_cache, max_len,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Grid `(rows, blocks)`, `HEADS` of a row's H + 2 KV heads each: queries are rotated where they lie, keys
    on their way into the cache; values are copied there.

    `qkv (rows, H + 2 KV, D)`; `cos`, `sin (positions, D / 2)` fp32; `HALF` is a power of two >= D / 2.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half: tl.constexpr = D // 2
    i = tl.arange(0, HALF)[None, :]
    ok = (i < half) & (head < H + 2 * KV)
    source = qkv + (row * (H + 2 * KV) + head) * D + i
    a = tl.load(source, mask=ok, other=0.0)
    b = tl.load(source + half, mask=ok, other=0.0)
    position = tl.load(positions + row)
    c = tl.load(cos + position * half + i, mask=i < half, other=0.0)
    s = tl.load(sin + position * half + i, mask=i < half, other=0.0)
    turns = head < H + KV
    x = a.to(tl.float32)
    y = b.to(tl.float32)
    a = tl.where(turns, (x * c - y * s).to(a.dtype), a)
    b = tl.where(turns, (y * c + x * s).to(b.dtype), b)
    is_query = ok & (head < H)
    tl.store(source, a, mask=is_query)
    tl.store(source + half, b, mask=is_query)
    place = (tl.load(slots + row) * max_len + position) * KV - H
    is_key = ok & (head >= H) & turns
    keys = k_cache + (place + head) * D + i
    tl.store(keys, a, mask=is_key)
    tl.store(keys + half, b, mask=is_key)
    is_value = ok & (head >= H + KV)
    values = v_cache + (place - KV + head) * D + i
    tl.store(values, a, mask=is_value)
    tl.store(values + half, b, mask=is_value)


@triton.jit  # type: ignore[untyped-decorator]
def attend_part(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, key_starts, lengths, sums, stats, scale, q_stride,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid `(rows, KV, programs)`: the query heads of one key head over every `programs`-th part of the keys.

    `q`: rows of `q_stride` numbers that begin with `H` heads. `key_starts`, `lengths (rows,)`: the first KV
    position of a row, counted through all slots, and how many of its keys it sees; `WINDOW` 0 means all.
    Writes `sums (rows, H, PARTS, D)` and `stats (rows, H, PARTS, 2)`, fp32; parts without keys write none.
    """
    row = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    length = tl.load(lengths + row)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    G: tl.constexpr = H // KV
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    heads = kv * G + g
    inside = (g < G)[:, None] & (d < D)[None, :]
    query = tl.load(q + row * q_stride + heads[:, None] * D + d[None, :], mask=inside, other=0.0)
    base = tl.load(key_starts + row).to(tl.int64) * (KV * D) + kv * D
    for part in range(low // PART + tl.program_id(2), tl.cdiv(length, PART), tl.num_programs(2)):
        first = part * PART
        largest = tl.full([GP], float("-inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        # Blocks that the window hides whole are passed over, so that each has a largest number to subtract.
        begin = tl.maximum(first, low // BLOCK * BLOCK)
        for start in range(begin, tl.minimum(first + PART, length), BLOCK):
            n = start + tl.arange(0, BLOCK)
            exists = n < length
            # Keys before the window are read too: with them in the masks of the loads, registers spill.
            seen = exists & (n >= low)
            at = base + n[:, None].to(tl.int64) * (KV * D) + d[None, :]
            present = exists[:, None] & (d < D)[None, :]
            k = tl.load(k_cache + at, mask=present, other=0.0)
            x = tl.dot(query, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
            x = tl.where(seen[None, :], x, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(x, 1))
            alpha = tl.exp2(largest - new_largest)
            p = tl.exp2(x - new_largest[:, None])
            total = total * alpha + tl.sum(p, 1)
            v = tl.load(v_cache + at, mask=present, other=0.0)
            acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            largest = new_largest
        out = (row * H + heads) * PARTS + part
        tl.store(sums + out[:, None] * D + d[None, :], acc, mask=inside)
        tl.store(stats + out * 2, largest, mask=g < G)
        tl.store(stats + out * 2 + 1, total, mask=g < G)


@triton.jit  # type: ignore[untyped-decorator]
def join_parts(  # type: ignore[no-untyped-def]
    sums, stats, lengths, out,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid `(rows, blocks)`, `HEADS` heads each: `out (rows, H, D)` from what `attend_part` wrote.

    Always in the order of the keys. A row without keys is left as it is.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    length = tl.load(lengths + row)
    if length > 0:
        first = 0
        if WINDOW > 0:
            first = tl.maximum(length - WINDOW, 0) // PART
        end = (length + PART - 1) // PART
        d = tl.arange(0, DP)[None, :]
        exists = head < H
        at = (row * H + head) * PARTS
        largest = tl.load(stats + (at + first) * 2, mask=exists, other=0.0)
        for part in range(first + 1, end):
            largest = tl.maximum(largest, tl.load(stats + (at + part) * 2, mask=exists, other=0.0))
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, DP], tl.float32)
        inside = exists[:, None] & (d < D)
        for part in range(first, end):
            weight = tl.exp2(tl.load(stats + (at + part) * 2, mask=exists, other=0.0) - largest)
            total += weight * tl.load(stats + (at + part) * 2 + 1, mask=exists, other=1.0)
            one = tl.load(sums + (at + part)[:, None] * D + d, mask=inside, other=0.0)
            acc += weight[:, None] * one
        joined = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (row * H + head)[:, None] * D + d, joined, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def silu_times(x, out, N: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid `(rows, blocks)`: `silu(gate) * up` of `x (rows, 2 N)`, gate first, rounded between."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = i < N
    gate = tl.load(x + row * 2 * N + i, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * N + N + i, mask=ok, other=0.0)
    y = (gate / (1.0 + tl.exp(-gate))).to(up.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * N + i, y.to(out.dtype.element_ty), mask=ok)
