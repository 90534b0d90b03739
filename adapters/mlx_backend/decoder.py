"""An mlx-lm model over one cache of slots.

mlx-lm's own batch cache pads rows on the left and is rebuilt as sequences come and go. Here each layer has
one array `(slots, heads, positions, width)` for keys and one for values, and a sequence stays where it is. A
run reads a stretch of slots without copying it; the mask hides what a row has not reached. MLX writes into
the arrays in place, as long as nobody else holds them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache
from numpy.typing import NDArray

from adapters.base import BackendError, UnsupportedModel


class MlxDecoder:
    def __init__(self, model: Any, num_slots: int, max_model_len: int) -> None:
        """Allocate the cache, by a first run.

        Raises:
            UnsupportedModel: a layer keeps something else than all keys and values.
            BackendError: the model does not run, or memory is short.
        """
        kinds = {type(cache) for cache in make_prompt_cache(model)}
        if kinds != {KVCache}:
            others = ", ".join(sorted(kind.__name__ for kind in kinds - {KVCache}))
            raise UnsupportedModel(f"BACKEND=mlx has no slots for layers with {others}: use BACKEND=torch")
        self._model = model
        self._caches = [_SlotCache(num_slots, max_model_len) for _ in model.layers]
        self.vocab_size: int = self.run(0, np.zeros((1, 1), dtype=np.int64), [1]).shape[1]
        arrays = [array for cache in self._caches for array in (cache.keys, cache.values)]
        self.dtype: Any = arrays[0].dtype
        self.kv_bytes_per_token = sum(array.nbytes for array in arrays) // (num_slots * max_model_len)

    def run(self, first_slot: int, token_ids: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
        """As `SlotDecoder.run`."""
        for cache in self._caches:
            cache.select(first_slot, lengths, token_ids.shape[1])
        try:
            logits = self._model(mx.array(token_ids), cache=self._caches)[:, -1].astype(mx.float32)
            mx.eval(logits, [(cache.keys, cache.values) for cache in self._caches])
        except RuntimeError as error:
            raise BackendError(f"MLX failed in a run of {len(lengths)} rows: {error}") from error
        return np.array(logits)


class _SlotCache:
    """One layer's keys and values. `offset`, `update_and_fetch` and `make_mask` are what mlx-lm's models ask
    of a cache."""

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self._shape = (num_slots, max_model_len)
        self.keys: Any = None
        self.values: Any = None

    def select(self, first_slot: int, lengths: list[int], num_tokens: int) -> None:
        """The rows of the next run, and how many tokens each has after it."""
        self._slots = slice(first_slot, first_slot + len(lengths))
        self._end = max(lengths)
        self.offset = mx.array(lengths) - num_tokens

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Both `(rows, heads, tokens, width)`; returns all positions up to the longest row's end."""
        if self.keys is None:
            self.keys, self.values = self._empty(keys), self._empty(values)
        rows = mx.arange(self._slots.start, self._slots.stop)[:, None]
        positions = self._positions(keys.shape[2])
        self.keys[rows, :, positions] = keys.transpose(0, 2, 1, 3)
        self.values[rows, :, positions] = values.transpose(0, 2, 1, 3)
        return self.keys[self._slots, :, : self._end], self.values[self._slots, :, : self._end]

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """`(rows, 1, tokens, positions)`, true where a token may look."""
        own = self._positions(num_tokens)[:, :, None]
        others = mx.arange(self._end)
        seen = others <= own
        if window_size is not None:
            seen &= others > own - window_size
        return seen[:, None]

    def _positions(self, num_tokens: int) -> Any:
        return self.offset[:, None] + mx.arange(num_tokens)

    def _empty(self, like: Any) -> Any:
        num_slots, max_model_len = self._shape
        return mx.zeros((num_slots, like.shape[1], max_model_len, like.shape[3]), like.dtype)
