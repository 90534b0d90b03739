"""The attention function that transformers calls in each layer, with the step's layout as an extra argument.

What the batched attention cannot compute is refused: soft-capped scores and attention sinks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adapters.base import UnsupportedModel
from adapters.torch_backend.model.attention import StepLayout

IMPLEMENTATION = "lab_slots"


def _attention_of_packed_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    lab_layout: StepLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: `(1, heads, T, D)` in, `(1, T, heads, D)` out."""
    if lab_layout is None:
        raise UnsupportedModel(f"{type(module).__name__} does not pass extra arguments on to its attention")
    if softcap is not None or s_aux is not None:
        what = "soft-capped scores" if softcap is not None else "attention sinks"
        raise UnsupportedModel(f"{type(module).__name__} uses {what}, which the batched attention cannot do")
    layer = module.layer_idx
    assert isinstance(layer, int)
    if sliding_window is None:
        sliding_window = window_of_layer(getattr(module, "config", None), layer)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = q.shape[2] ** -0.5 if scaling is None else scaling
    return lab_layout.attend(layer, q, k, v, scale, sliding_window)[None], None


def window_of_layer(config: Any, layer: int) -> int | None:
    """The window of a layer as the configuration has it: some models tell only their mask of it."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if window and (not kinds or kinds[layer] == "sliding_attention") else None


def register() -> None:
    """Make the attention known to transformers under `IMPLEMENTATION`; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_of_packed_rows)
