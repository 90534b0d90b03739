"""The forward pass of Llama-shaped models with fewer, larger operators than the Hugging Face module has.

The generic path stays the reference: the backend compares the two before it trusts this one. On a CPU whose
kernels cover all of a model, `KernelLlama` is used instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.torch_backend.cpu.kernels import CpuKernels
from adapters.torch_backend.model.attention import StepLayout
from adapters.torch_backend.model.linear import Linear, make_linear
from adapters.torch_backend.model.llama_shape import Layer, LlamaShape, rotary_table, take_layers


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
    ) -> None:
        """`kernels` take over what they cover, for positions below `max_len`.

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
        self._rotary_table = rotary_table(model, max_len, shape.head_dim) if covered else None
        make = partial(make_linear, packed=packed, kernels=kernels)
        self.head = make(head.weight, None)
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
        return logits

    @staticmethod
    def _gated(layer: Layer[Linear], h: Tensor) -> Tensor:
        if layer.up is not None:
            return layer.up.times(h, layer.gate.swish(h))
        gate, up = layer.gate(h).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._kernels is not None:
            return self._kernels.norm(x, weight, self._shape.eps)
        return F.rms_norm(x, (x.shape[1],), weight, self._shape.eps)

    def _attention_of_step(self, x: Tensor, layout: StepLayout) -> Callable[[int, Tensor], Tensor]:
        """A function from a layer's number and its `qkv (T, all heads * D)` to attention `(T, heads * D)`."""
        num_rows, heads, kv_heads = len(x), self._shape.num_heads, self._shape.num_kv_heads
        dim, scaling = self._shape.head_dim, self._shape.scaling
        shape = (num_rows, heads + 2 * kv_heads, dim)
        if self._rotary_table is not None:
            table = self._rotary_table

            def attend_with_kernels(index: int, qkv: Tensor) -> Tensor:
                out = layout.rotate_and_attend(index, qkv.view(shape), heads, scaling, table)
                return out.view(num_rows, -1)

            return attend_with_kernels

        rotated = heads + kv_heads
        cos, sin = (t.view(num_rows, 1, dim) for t in self.rotary(x, layout.positions[None]))
        # x * cos + rotate_half(x) * sin, with the halves swapped and the sign moved into the sine.
        sin = torch.cat((-sin[..., : dim // 2], sin[..., dim // 2 :]), dim=-1)

        def attend(index: int, qkv: Tensor) -> Tensor:
            qkv = qkv.view(shape)
            qk = qkv[:, :rotated]
            swapped = qk.view(num_rows, rotated, 2, dim // 2).flip(2).flatten(2)
            qk.mul_(cos).addcmul_(swapped, sin)
            out = layout.attend(index, qk[:, :heads], qk[:, heads:], qkv[:, rotated:], scaling)
            return out.reshape(num_rows, -1)

        return attend
