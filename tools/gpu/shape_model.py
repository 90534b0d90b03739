"""A preset's shape with weights that are made on the device: in seconds, and without a disk.

The weights are as widely spread as the preset's own but not the same, so times hold and texts do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from adapters.models.preset_tokenizer import write_json
from adapters.models.presets import PRESETS, hf_config, tensors
from adapters.torch_backend import loading

_ROOM = {"cuda": 1.1, "cpu": 2.5}
"""Memory to load with, as a multiple of the weights' bytes. On a CPU packed copies are made beside them."""


def fits_memory(preset: str, device: str, dtype: torch.dtype) -> bool:
    """True where the memory that is free holds the weights."""
    kind = device.partition(":")[0]
    needed = _ROOM.get(kind, 2.5) * PRESETS[preset].num_parameters * dtype.itemsize
    free: int = torch.cuda.mem_get_info()[0] if kind == "cuda" else psutil.virtual_memory().available
    return needed <= free


@contextmanager
def shape_folder(preset: str, parent: Path) -> Iterator[Path]:
    """A folder of that name with a configuration, which can be loaded as a model while this lasts."""
    folder = parent / preset
    folder.mkdir()
    write_json(folder / "config.json", hf_config(PRESETS[preset]))
    read = loading.read_weights
    loading.read_weights = _made_on_device
    try:
        yield folder
    finally:
        loading.read_weights = read


def _made_on_device(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """What `loading.read_weights` returns, drawn as `seeded_model` draws it but by the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for tensor in tensors(PRESETS[folder.name]):
            weight = model.get_parameter(tensor.name)
            if tensor.exponent is None:
                weight.fill_(1.0)
            else:
                weight.uniform_(-1.0, 1.0).mul_(255 * 2.0**tensor.exponent)
    return model
