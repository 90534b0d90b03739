"""BACKEND names and the classes behind them, imported only when asked for.

A new backend is one entry here; nothing else lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from adapters.base import Backend, BackendConfig, ConfigError

BACKENDS: dict[str, str] = {
    "torch": "adapters.torch_backend.factory:create",
    "llama_cpp": "adapters.llama_cpp_backend.backend:LlamaCppBackend",
    "null": "adapters.null_backend:NullBackend",
}

_EXTRAS = {
    "torch": ("torch", ("torch", "transformers", "safetensors")),
    "llama_cpp": ("llama", ("llama_cpp", "gguf")),
}
"""The extra of this project that brings a backend's own packages, and these packages."""


def check_backend(name: str) -> None:
    """Refuse what is no BACKEND, without importing any.

    Raises:
        ConfigError: there is no backend of this name.
    """
    if name not in BACKENDS:
        names = ", ".join(BACKENDS)
        raise ConfigError(f"there is no backend {name!r}: BACKEND must be one of {names}")


def create_backend(config: BackendConfig) -> Backend:
    """Import the backend of `config.backend` and load its model.

    Raises:
        ConfigError: there is no such backend, its packages are not installed, or the model cannot be found.
        BackendError: the model failed while loading.
    """
    check_backend(config.backend)
    module_name, class_name = BACKENDS[config.backend].split(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        extra, packages = _EXTRAS.get(config.backend, ("", ()))
        if error.name in packages:
            raise ConfigError(
                f"BACKEND={config.backend} needs the package {error.name}: "
                f"install the extra with `uv sync --extra {extra}`"
            ) from error
        raise
    make = cast(Callable[[BackendConfig], Backend], getattr(module, class_name))
    return make(config)
