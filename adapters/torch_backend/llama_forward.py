"""The forward pass of Llama-shaped models with fewer, larger operators than the Hugging Face module has.

What enters is a loaded model of the Llama family (Llama, Mistral without a window, Qwen2); its weights are
joined and packed, the originals freed. What leaves is a function from packed rows to logits. The generic
path stays the reference: the backend compares the two before it trusts this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.torch_backend.attention import StepLayout
from adapters.torch_backend.cpu_kernels import CpuKernels
from adapters.torch_backend.linear import Linear, make_linear

_FAMILY = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear | None
    """None: `gate` holds both, one below the other."""
    down: Linear


def is_llama_shaped(model: nn.Module) -> bool:
    """True where every part of the model is what `LlamaForward` computes."""
    config: Any = model.config
    return (
        _FAMILY.get(config.model_type) == type(model).__name__
        and config.hidden_act == "silu"
        and getattr(config, "sliding_window", None) is None
    )


class LlamaForward(nn.Module):
    """Logits of packed rows. Takes the weights out of `model`, which cannot be used afterwards."""

    def __init__(
        self,
        model: nn.Module,
        *,
        packed: bool,
        kernels: CpuKernels | None = None,
        max_len: int = 0,
        joined: bool = False,
    ) -> None:
        """`kernels` take over what they cover, for positions below `max_len`.

        With `joined`, gate and up are one product: fewer and larger ones suit a GPU, while a CPU's products
        can end with what follows them.
        """
        super().__init__()
        config: Any = model.config
        inner: Any = model.model
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.eps: float = config.rms_norm_eps
        self.embed = inner.embed_tokens
        self.rotary = inner.rotary_emb
        self.norm = inner.norm.weight
        self._kernels = (
            kernels if kernels and kernels.covers(self.head_dim, hidden_size=config.hidden_size) else None
        )
        self._rotary_table = self._make_rotary_table(max_len) if self._kernels else None
        head: Any = model.lm_head
        self.head = make_linear(head.weight, None, packed=packed, kernels=kernels)
        self.layers = [self._take(layer, packed, kernels, joined) for layer in inner.layers]
        linears = [self.head, *(m for x in self.layers for m in (x.qkv, x.out, x.gate, x.up, x.down))]
        self.linears = nn.ModuleList([linear for linear in linears if linear is not None])

    def _make_rotary_table(self, max_len: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(max_len, D / 2)` in fp32."""
        like = torch.empty(0, dtype=torch.float32)
        cos, sin = self.rotary(like, torch.arange(max_len)[None])
        half = self.head_dim // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    @staticmethod
    def _take(layer: Any, packed: bool, kernels: CpuKernels | None, join_gate: bool) -> _Layer:
        attn, mlp = layer.self_attn, layer.mlp

        def joined(*parts: nn.Linear) -> Linear:
            bias = torch.cat([p.bias for p in parts]) if parts[0].bias is not None else None
            weight = torch.cat([p.weight for p in parts])
            linear = make_linear(weight, bias, packed=packed, kernels=kernels)
            for part in parts:
                del part.weight
            return linear

        return _Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=joined(attn.q_proj, attn.k_proj, attn.v_proj),
            out=joined(attn.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate=joined(mlp.gate_proj, mlp.up_proj) if join_gate else joined(mlp.gate_proj),
            up=None if join_gate else joined(mlp.up_proj),
            down=joined(mlp.down_proj),
        )

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
    def _gated(layer: _Layer, h: Tensor) -> Tensor:
        if layer.up is not None:
            return layer.up.times(h, layer.gate.swish(h))
        gate, up = layer.gate(h).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._kernels is not None:
            return self._kernels.norm(x, weight, self.eps)
        return F.rms_norm(x, (x.shape[1],), weight, self.eps)

    def _attention_of_step(self, x: Tensor, layout: StepLayout) -> Callable[[int, Tensor], Tensor]:
        """A function from a layer's number and its `qkv (T, all heads * D)` to attention `(T, heads * D)`."""
        num_rows, heads, kv_heads, dim = len(x), self.num_heads, self.num_kv_heads, self.head_dim
        shape = (num_rows, heads + 2 * kv_heads, dim)
        if self._rotary_table is not None:
            table = self._rotary_table

            def attend_with_kernels(index: int, qkv: Tensor) -> Tensor:
                out = layout.rotate_and_attend(index, qkv.view(shape), heads, self.scaling, table)
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
            out = layout.attend(index, qk[:, :heads], qk[:, heads:], qkv[:, rotated:], self.scaling)
            return out.reshape(num_rows, -1)

        return attend
