"""Tensors of a Hugging Face folder, mapped from its safetensors files; and the head of a new one.

Nothing here needs torch. Tensors stay on the disk until they are read. bfloat16, which NumPy does not
know, comes as its bit patterns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import ConfigError

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; `dtype` is the format's word: F32, F16 or BF16."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of the file."""

    def read(self) -> NDArray[Any]:
        """The tensor as an array of `shape`, bf16 as uint16."""
        return np.memmap(self.path, dtype=_DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


def safetensors_header(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str) -> bytes:
    """The start of a file whose tensors, all of one dtype, follow in this order.

    Source: the safetensors format: header length (8 bytes, little-endian), JSON, then the raw tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes:
        end = offset + math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def count_parameters(folder: Path) -> int:
    """Of all tensors; 0 for a folder without safetensors files."""
    if not any(folder.glob("*.safetensors")):
        return 0
    return sum(math.prod(tensor.shape) for tensor in list_tensors(folder).values())


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors by name.

    Raises:
        ConfigError: there is no safetensors file, or one is cut off or of a kind that cannot be read.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{folder} has no weights in safetensors format")
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        tensors |= _tensors_of(path)
    return tensors


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """Source: the safetensors format: header length (8 bytes, little-endian), JSON, then the raw tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > size - 8:
            raise ConfigError(f"{path} is cut off: its header alone says {header_size} bytes")
        try:
            header = json.loads(file.read(header_size))
        except ValueError as error:
            raise ConfigError(f"{path} is damaged: its header cannot be read ({error})") from error
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        dtype, (start, end) = entry["dtype"], entry["data_offsets"]
        if dtype not in _DTYPES:
            raise ConfigError(f"{path}: {name} is stored as {dtype}; only F32, F16 and BF16 can be exported")
        if 8 + header_size + end > size:
            raise ConfigError(f"{path} is cut off: {name} ends beyond its {size} bytes; fetch it again")
        num_bytes = math.prod(entry["shape"]) * np.dtype(_DTYPES[dtype]).itemsize
        if num_bytes != end - start:
            raise ConfigError(f"{path} is damaged: {name} has {end - start} bytes, its shape {num_bytes}")
        tensors[name] = StoredTensor(path, dtype, tuple(entry["shape"]), 8 + header_size + start)
    return tensors
