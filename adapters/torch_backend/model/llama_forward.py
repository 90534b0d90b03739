"""The forward pass of Llama-shaped models with fewer, larger operators than the Hugging Face module has.

The generic path stays the reference: the backend compares the two before it trusts this one. On a CPU whose
kernels cover all of a model, `KernelLlama` is used instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.torch_backend.cpu.kernels import CpuKernels
from adapters.torch_backend.model.attention import StepLayout
from adapters.torch_backend.model.flash_attention import KeySpans
from adapters.torch_backend.model.linear import Linear, make_linear
from adapters.torch_backend.model.llama_shape import Layer, LlamaShape, rotary_table, take_layers


class DecodeAttention(Protocol):
    """An `AttentionOp` for rows that are one entry each; rows of length 0 are left as they are in `out`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: KeySpans,
        max_len: int,
        scaling: float,
        window: int,
        out: Tensor | None = None,
    ) -> Tensor: ...


class FusedOps(Protocol):
    """What a device can do in one launch between the matrix products."""

    @property
    def attend(self) -> DecodeAttention: ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The root mean square norm of `x (T, hidden)`."""
        ...

    def rotate_and_store(
        self,
        qkv: Tensor,
        table: tuple[Tensor, Tensor],
        slots: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        """Rotate the queries of `qkv (T, heads + 2 kv_heads, D)` in place, keys on their way into the cache.

        `table`: cosines and sines `(positions, D / 2)`; caches `(slots, max_len, kv_heads, D)`.
        """
        ...

    def gated(self, x: Tensor) -> Tensor:
        """`silu(gate) * up` of `x (T, 2 inner)`, gate first."""
        ...


class LlamaForward(nn.Module):
    """Logits of packed rows. Takes the weights out of `model`, which cannot be used afterwards."""

    def __init__(
        self,
        model: nn.Module,
        shape: LlamaShape,
        *,
        packed: bool,
        kernels: CpuKernels | None = None,
        max_len: int = 0,
        joined: bool = False,
        fused: FusedOps | None = None,
    ) -> None:
        """`kernels` and `fused` take over what they cover, for positions below `max_len`.

        With `joined`, gate and up are one product: fewer and larger ones suit a GPU.
        """
        super().__init__()
        inner: Any = model.model
        head: Any = model.lm_head
        self._shape = shape
        self.embed = inner.embed_tokens
        self.rotary = inner.rotary_emb
        self.norm = inner.norm.weight
        covered = kernels is not None and kernels.covers(shape.head_dim, hidden_size=shape.hidden_size)
        self._kernels = kernels if covered else None
        self._fused = fused
        self._rotary_table: tuple[Tensor, Tensor] | None = None
        if covered or fused is not None:
            cos, sin = rotary_table(model, max_len, shape.head_dim)
            self._rotary_table = cos.to(head.weight.device), sin.to(head.weight.device)
        make = partial(make_linear, packed=packed, kernels=kernels)
        outputs = head.weight
        if kernels is not None and kernels.has_linear:
            outputs = kernels.whole_panels(outputs)
        self.head = make(outputs, None)
        self.layers = take_layers(model, make, join_gate=joined)
        self.linears = nn.ModuleList([part for layer in self.layers for part in layer.linears])

    def forward(self, input_ids: Tensor, layout: StepLayout, logit_rows: Tensor) -> Tensor:
        """`input_ids (T,)` at `layout.positions`; returns logits `(len(logit_rows), vocabulary)`."""
        x = self.embed(input_ids)
        attend = self._attention_of_step(x, layout)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(self._normed(x, layer.input_norm))
            x = layer.out.plus(attend(index, qkv), x)
            h = self._normed(x, layer.mlp_norm)
            x = layer.down.plus(self._gated(layer, h), x)
        logits: Tensor = self.head(self._normed(x[logit_rows], self.norm))
        return logits[:, : self._shape.vocab_size].contiguous()

    def _gated(self, layer: Layer[Linear], h: Tensor) -> Tensor:
        if layer.up is not None:
            return layer.up.times(h, layer.gate.swish(h))
        if self._fused is not None:
            return self._fused.gated(layer.gate(h))
        gate, up = layer.gate(h).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._kernels is not None:
            return self._kernels.norm(x, weight, self._shape.eps)
        if self._fused is not None:
            return self._fused.norm(x, weight, self._shape.eps)
        return F.rms_norm(x, (x.shape[1],), weight, self._shape.eps)

    def _attention_of_step(self, x: Tensor, layout: StepLayout) -> Callable[[int, Tensor], Tensor]:
        """A function from a layer's number and its `qkv (T, all heads * D)` to attention `(T, heads * D)`."""
        num_rows, heads, kv_heads = len(x), self._shape.num_heads, self._shape.num_kv_heads
        dim, scaling = self._shape.head_dim, self._shape.scaling
        shape = (num_rows, heads + 2 * kv_heads, dim)
        table, fused = self._rotary_table, self._fused
        if table is not None and fused is not None:

            def attend_fused(index: int, qkv: Tensor) -> Tensor:
                qkv = qkv.view(shape)
                k_cache, v_cache = layout.caches(index, qkv[:, heads:])
                fused.rotate_and_store(qkv, table, layout.slots, layout.positions, k_cache, v_cache)
                return layout.attend_stored(qkv[:, :heads], k_cache, v_cache, scaling, 0).view(num_rows, -1)

            return attend_fused

        if table is not None:

            def attend_with_kernels(index: int, qkv: Tensor) -> Tensor:
                out = layout.rotate_and_attend(index, qkv.view(shape), heads, scaling, table)
                return out.view(num_rows, -1)

            return attend_with_kernels

        turned = heads + kv_heads
        cos, sin = (t.view(num_rows, 1, dim) for t in self.rotary(x, layout.positions[None]))
        # x * cos + rotate_half(x) * sin, with the halves swapped and the sign moved into the sine.
        sin = torch.cat((-sin[..., : dim // 2], sin[..., dim // 2 :]), dim=-1)

        def attend(index: int, qkv: Tensor) -> Tensor:
            qkv = qkv.view(shape)
            qk = qkv[:, :turned]
            swapped = qk.view(num_rows, turned, 2, dim // 2).flip(2).flatten(2)
            qk.mul_(cos).addcmul_(swapped, sin)
            out = layout.attend(index, qk[:, :heads], qk[:, heads:], qkv[:, turned:], scaling)
            return out.reshape(num_rows, -1)

        return attend
