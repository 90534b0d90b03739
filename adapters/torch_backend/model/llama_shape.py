"""What models of Llama's shape have in common (Llama, Mistral without a window, Qwen2).

Taking the layers frees the original weights, so a model is never in memory twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from adapters.torch_backend.model.linear import Linear

_FAMILY = {"llama", "mistral", "qwen2"}

L = TypeVar("L", bound=Linear)


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The numbers that the layers share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    vocab_size: int
    eps: float

    @property
    def scaling(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def products(self) -> list[tuple[int, int]]:
        """Sizes `(out, in)` of the matrices of a layer."""
        hidden, mixed = self.hidden_size, self.num_heads * self.head_dim
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return [(qkv, hidden), (hidden, mixed), (self.inner_size, hidden), (hidden, self.inner_size)]


def llama_shape(config: Any) -> LlamaShape | None:
    """None where a causal language model of such a configuration has any part that is not as in Llama."""
    if (
        config.model_type not in _FAMILY
        or config.hidden_act != "silu"
        or getattr(config, "sliding_window", None) is not None
    ):
        return None
    heads = config.num_attention_heads
    return LlamaShape(
        heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.rms_norm_eps,
    )


@dataclass(frozen=True, slots=True)
class Layer(Generic[L]):
    """What one layer multiplies with."""

    input_norm: Tensor
    qkv: L
    out: L
    mlp_norm: Tensor
    gate: L
    """Its product goes through silu and is multiplied with that of `up`."""
    up: L | None
    """None: `gate` holds both, one below the other."""
    down: L

    @property
    def linears(self) -> list[L]:
        parts = (self.qkv, self.out, self.gate, self.up, self.down)
        return [part for part in parts if part is not None]


def take_layers(
    model: Any, make: Callable[[Tensor, Tensor | None], L], *, join_gate: bool = False
) -> list[Layer[L]]:
    """All layers' weights as `make` packs them. The model cannot be used afterwards."""

    def joined(*parts: nn.Linear) -> L:
        bias = torch.cat([p.bias for p in parts]) if parts[0].bias is not None else None
        linear = make(torch.cat([p.weight for p in parts]), bias)
        for part in parts:
            del part.weight
        return linear

    def taken(layer: Any) -> Layer[L]:
        attn, mlp = layer.self_attn, layer.mlp
        return Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=joined(attn.q_proj, attn.k_proj, attn.v_proj),
            out=joined(attn.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate=joined(mlp.gate_proj, mlp.up_proj) if join_gate else joined(mlp.gate_proj),
            up=None if join_gate else joined(mlp.up_proj),
            down=joined(mlp.down_proj),
        )

    return [taken(layer) for layer in model.model.layers]


def rotary_table(model: Any, max_len: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(max_len, head_dim / 2)` in fp32."""
    like = torch.empty(0, dtype=torch.float32)
    cos, sin = model.model.rotary_emb(like, torch.arange(max_len)[None])
    half = head_dim // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
