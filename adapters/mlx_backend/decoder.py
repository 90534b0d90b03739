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
            UnsupportedModel: a layer keeps something else than all keys and values, or rows of a run cannot
                have lengths of their own.
            BackendError: the model does not run, or memory is short.
        """
        kinds = {type(cache) for cache in make_prompt_cache(model)}
        if kinds != {KVCache}:
            others = ", ".join(sorted(kind.__name__ for kind in kinds - {KVCache}))
            raise UnsupportedModel(f"BACKEND=mlx has no slots for layers with {others}: use BACKEND=torch")
        self._model = model
        self._caches = [_SlotCache(num_slots, max_model_len) for _ in model.layers]
        num_rows = min(2, num_slots)
        try:
            logits = self.run(0, np.zeros((num_rows, 1), dtype=np.int64), [1] * num_rows)
        except (TypeError, ValueError) as error:
            raise UnsupportedModel(f"BACKEND=mlx cannot run rows of unlike lengths: {error}") from error
        self.vocab_size: int = logits.shape[1]
        arrays = [array for cache in self._caches for array in (cache.keys, cache.values)]
        self.dtype: Any = arrays[0].dtype
        self.kv_bytes_per_token = sum(array.nbytes for array in arrays) // (num_slots * max_model_len)

    def run(self, first_slot: int, token_ids: NDArray[np.int64], lengths: list[int]) -> NDArray[np.float32]:
        """As `SlotDecoder.run`."""
        rows = mx.arange(first_slot, first_slot + len(lengths))[:, None]
        offset = mx.array(lengths) - token_ids.shape[1]
        positions = offset[:, None] + mx.arange(token_ids.shape[1])
        for cache in self._caches:  # made once for all layers
            cache.select(slice(first_slot, first_slot + len(lengths)), max(lengths), rows, offset, positions)
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

    def select(self, slots: slice, end: int, rows: Any, offset: Any, positions: Any) -> None:
        """The rows of the next run: `rows (rows, 1)` are their slots, `positions (rows, tokens)` where their
        tokens go, `end` the tokens of the longest after it."""
        self._slots, self._end = slots, end
        self._rows, self.offset, self._positions = rows, offset, positions

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Both `(rows, heads, tokens, width)`; returns all positions up to the longest row's end."""
        if self.keys is None:
            self.keys, self.values = self._empty(keys), self._empty(values)
        self.keys[self._rows, :, self._positions] = keys.transpose(0, 2, 1, 3)
        self.values[self._rows, :, self._positions] = values.transpose(0, 2, 1, 3)
        return self.keys[self._slots, :, : self._end], self.values[self._slots, :, : self._end]

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """`(rows, 1, tokens, positions)`, true where a token may look."""
        own = self._positions[:, :, None]
        others = mx.arange(self._end)
        seen = others <= own
        if window_size is not None:
            seen &= others > own - window_size
        return seen[:, None]

    def _empty(self, like: Any) -> Any:
        num_slots, max_model_len = self._shape
        return mx.zeros((num_slots, like.shape[1], max_model_len, like.shape[3]), like.dtype)
