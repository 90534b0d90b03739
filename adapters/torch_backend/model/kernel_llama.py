"""A step of a Llama-shaped model in one call of the compiled kernels.

A call of Python or of torch for each operator costs a fifth of a step at one row: the weights of the model
push their code out of the caches, so each call is fetched from memory again.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapters.torch_backend.cpu.kernels import CpuKernels, KernelLayer, KernelModel
from adapters.torch_backend.model.attention import StepLayout, joined_rows
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.model.linear import KernelLinear
from adapters.torch_backend.model.llama_shape import LlamaShape, rotary_table, take_layers


class KernelLlama(nn.Module):
    """Takes the weights out of a model, which cannot be used afterwards; for positions below `max_len`."""

    def __init__(self, model: nn.Module, shape: LlamaShape, kernels: CpuKernels, max_len: int) -> None:
        super().__init__()
        inner: Any = model.model
        head: Any = model.lm_head
        make = partial(KernelLinear, kernels=kernels)
        self.kernels = kernels
        self._shape = shape
        self._rotary = rotary_table(model, max_len, shape.head_dim)
        self._embedding: Tensor = inner.embed_tokens.weight
        self._norm: Tensor = inner.norm.weight
        self._head = make(kernels.whole_panels(head.weight), None)
        self._layers = take_layers(model, make)
        self.linears = nn.ModuleList([part for layer in self._layers for part in layer.linears])
        self._bound: tuple[SlotCache, KernelModel] | None = None
        self._make_logits(0)

    @staticmethod
    def covers(shape: LlamaShape, kernels: CpuKernels) -> bool:
        """True where every product and the attention can be the kernels'; the head is padded if need be."""
        attends = kernels.has_prompts and kernels.covers(shape.head_dim, hidden_size=shape.hidden_size)
        return attends and all(kernels.covers_linear(*sizes) for sizes in shape.products)

    def run(
        self,
        cache: SlotCache,
        ids: Seq[int],
        slots: Seq[int],
        positions: Seq[int],
        num_decode_rows: int,
        prompts: Seq[tuple[int, int]],
        logit_rows: Seq[int],
    ) -> tuple[Tensor, list[int]]:
        """Logits of `logit_rows`, in memory that the next step writes again, and the argmax of each.

        Decode rows come first; `prompts` are first rows and numbers of rows: neighbouring positions of one
        slot.

        Raises:
            RuntimeError: an id that has no embedding.
        """
        if ids and (min(ids) < 0 or max(ids) >= self._shape.vocab_size):
            raise RuntimeError(f"a token id is not in the vocabulary of {self._shape.vocab_size}")
        if self._bound is None or self._bound[0] is not cache:
            self._bound = cache, self._bind(cache)
        if len(self._padded_logits) < len(logit_rows):
            self._make_logits(len(logit_rows))
        shape = self._shape
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
        step = self.kernels.step(
            slots, positions, num_decode_rows, self._rotary, heads, cache.tables, shape.scaling
        )
        model = self._bound[1]
        likeliest = self.kernels.run_model(step, model, ids, prompts, logit_rows, self._padded_logits)
        return self._logits, likeliest

    def forward(self, input_ids: Tensor, layout: StepLayout, logit_rows: Tensor) -> Tensor:
        """The same for the rows of a layout; returns logits `(len(logit_rows), vocabulary)`."""
        ids, slots, positions = (t.tolist() for t in (input_ids, layout.slots, layout.positions))
        prompts = joined_rows(layout.prompt_blocks)
        rows = logit_rows.tolist()
        logits, _ = self.run(layout.cache, ids, slots, positions, layout.num_decode_rows, prompts, rows)
        return logits[: len(rows)].clone()

    def _make_logits(self, num_rows: int) -> None:
        self._padded_logits = torch.empty(num_rows, self._head.out_features, dtype=self.kernels.dtype)
        self._logits = self._padded_logits[:, : self._shape.vocab_size]

    def _bind(self, cache: SlotCache) -> KernelModel:
        """Where everything lies; the tensors are held by this module and by the cache."""
        shape = self._shape
        no_keys = self._embedding.new_empty(0, shape.num_kv_heads, shape.head_dim)
        layers = (KernelLayer * len(self._layers))()
        for index, layer in enumerate(self._layers):
            keys, values = cache.layer(index, no_keys, no_keys)
            where = (t.data_ptr() for t in (layer.input_norm, layer.mlp_norm, keys, values))
            layers[index] = KernelLayer(*where, *(part.packed for part in layer.linears))
        where = (t.data_ptr() for t in (self._embedding, self._norm))
        return KernelModel(*where, self._head.packed, layers, len(layers), shape.vocab_size, shape.eps)
