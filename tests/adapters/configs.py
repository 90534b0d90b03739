"""A backend's configuration with its options given beside the common fields."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from adapters.base import BackendConfig
from adapters.registry import BACKENDS


def make_config(backend: str = "torch", **values: Any) -> BackendConfig:
    kind = BACKENDS[backend].options
    own = {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}
    return BackendConfig(backend=backend, options=kind(**own), **values)
