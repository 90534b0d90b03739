"""What `gpu_bench` measures, in which order, and how much of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.models.presets import PRESETS

_PARTS = "tools.gpu.parts"
_YARDSTICK = "tools.gpu.yardstick"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work each part does."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    few_rows: tuple[int, ...] = (1, 16, 64, 256)
    """For what is held against the decode steps of `rows`."""
    profiled_rows: tuple[int, ...] = (1, 64, 256)
    context: int = 256
    """Tokens that a decode row has behind it."""
    steps: int = 40
    prefill: tuple[int, ...] = (512, 1024)
    concurrency: tuple[int, ...] = (256, 1, 64, 16)
    lengths: tuple[int, int] = (100, 512)
    """Of prompts and of answers, in tokens."""
    copy_bytes: int = 4 << 30
    matrix: int = 8192
    answers: int = 8
    answer_tokens: int = 32
    yardstick: tuple[int, ...] = (64, 256)
    """Requests at a time for transformers' continuous batching and for the engine beside it."""
    max_step_tokens: int = 2048


QUICK = Sizes(
    rows=(1, 4),
    few_rows=(1, 4),
    profiled_rows=(2,),
    context=16,
    steps=3,
    prefill=(32,),
    concurrency=(2, 1),
    lengths=(4, 12),
    copy_bytes=16 << 20,
    matrix=256,
    answers=2,
    answer_tokens=6,
    yardstick=(2,),
    max_step_tokens=256,
)


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the run."""

    name: str
    function: str
    """`module:function`; it gets a `tools.gpu.part.PartRun`."""
    model: str
    needs_s: float
    """With less time left than this, the part is skipped."""
    limit_s: float
    """The process is killed after so many seconds."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `TorchOptions`."""
    real_weights: bool = False
    """Else only the model's shape is taken, and its weights are made on the device."""

    @property
    def title(self) -> str:
        return f"{self.name} of {self.model}" + (" (real weights)" if self.real_weights else "")


NAMES = ("same", "steps", "strategies", "invariant", "sampled", "yardstick", "plain")
"""The values of `--parts`, in the order in which they run."""


def make_plan(names: Sequence[str], models: Sequence[str], *, real_model: str) -> list[Part]:
    """Most valuable first: all parts of the first model, and between them the steps of the others."""
    first, *others = models
    parts = []
    if "same" in names and (real_model in PRESETS or real_model not in models):
        parts.append(Part("same", f"{_PARTS}:same_tokens", real_model, 15, 90, real_weights=True))
    for name in NAMES:
        if name in names:
            parts += _parts(name, first)
            if name == "steps":
                parts += [part for model in others for part in _parts(name, model)]
    for model in others:
        rest = [name for name in NAMES if name in names and name not in ("same", "steps")]
        parts += [part for name in rest for part in _parts(name, model)]
    return parts


def _parts(name: str, model: str) -> list[Part]:
    if name == "same":
        return [Part("same", f"{_PARTS}:same_tokens", model, 30, 90)]
    if name == "steps":
        return [Part("steps", f"{_PARTS}:steps", model, 20, 90)]
    if name == "plain":
        options = {"triton_kernels": False}
        return [Part("plain", f"{_PARTS}:plain_steps", model, 20, 60, options)]
    if name == "strategies":
        return [Part("strategies", f"{_PARTS}:strategies", model, 30, 140)]
    if name == "invariant":
        options = {"batch_invariant": True}
        return [Part("invariant", f"{_PARTS}:invariant_steps", model, 20, 75, options)]
    if name == "sampled":
        return [Part("sampled", f"{_PARTS}:sampled_steps", model, 20, 60)]
    assert name == "yardstick"
    return [
        Part("yardstick, engine", f"{_YARDSTICK}:engine", model, 20, 60),
        Part("yardstick, transformers", f"{_YARDSTICK}:transformers", model, 30, 120),
    ]
