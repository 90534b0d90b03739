"""The names that BACKEND may have, and what each backend says of itself.

A new backend is a folder `adapters/<name>_backend` whose `DESCRIPTION` can be imported without the engine's
packages, one name here, and an extra in pyproject.toml. Nothing else lists the names. Where the packages
cannot be installed beside the others', the folder is a project with a lock of its own instead of an extra.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapters.base import Backend, BackendConfig, ConfigError, SchedulingEngine
from adapters.description import BackendDescription

if TYPE_CHECKING:
    from adapters.text.tokenizer import Tokenizer

_NAMES = (
    "torch",
    "llama_cpp",
    "openvino",
    "onnx",
    "mlx",
    "vllm",
    "null",
)

BACKENDS: dict[str, BackendDescription] = {
    name: import_module(f"adapters.{name}_backend").DESCRIPTION for name in _NAMES
}


def check_backend(name: str) -> None:
    """Refuse what is no BACKEND.

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
    return cast(Backend, _call(BACKENDS[config.backend].make, config))


def create_scheduling_engine(config: BackendConfig) -> SchedulingEngine:
    """As `create_backend`, with the engine's own scheduler.

    Raises:
        ConfigError, BackendError: as there, or the backend has none.
    """
    check_scheduling(config.backend)
    return cast(SchedulingEngine, _call(BACKENDS[config.backend].make_scheduling or "", config))


def check_scheduling(name: str) -> None:
    """Refuse SCHEDULING=engine for a backend without a scheduler of its own.

    Raises:
        ConfigError: this is one, or there is no backend of this name.
    """
    check_backend(name)
    if BACKENDS[name].make_scheduling is None:
        able = ", ".join(other for other, of in BACKENDS.items() if of.make_scheduling)
        raise ConfigError(
            f"SCHEDULING=engine needs a backend with a scheduler of its own: {able}, not {name}"
        )


def load_tokenizer(config: BackendConfig) -> Tokenizer:
    """The tokenizer of `config.model`, which is made or fetched when it is missing.

    Raises:
        ConfigError: there is no such model, it has no tokenizer that can be read, or packages are missing.
    """
    check_backend(config.backend)
    description = BACKENDS[config.backend]
    if description.tokenizer is None:
        from adapters.models import store

        return store.load_tokenizer(config, description.formats)
    return cast("Tokenizer", _call(description.tokenizer, config))


def interpreter_of(backend: str) -> str:
    """The Python that has the packages of a backend: this one, unless they are in an environment of its own.

    Raises:
        ConfigError: there is no backend of this name.
    """
    check_backend(backend)
    own = Path(f"{sys.prefix}-{backend}", "bin", "python")
    description = BACKENDS[backend]
    is_elsewhere = description.own_environment and not all(map(find_spec, description.packages))
    return str(own) if is_elsewhere and own.is_file() else sys.executable


def extra_of(package: str) -> str | None:
    """The extra of this project that brings a backend's package."""
    return next((d.extra for d in BACKENDS.values() if package in d.packages), None)


def _call(target: str, config: BackendConfig) -> Any:
    module_name, _, name = target.partition(":")
    try:
        return getattr(import_module(module_name), name)(config)
    except ModuleNotFoundError as error:
        description = BACKENDS[config.backend]
        if description.own_environment and error.name in description.packages:
            raise ConfigError(
                f"BACKEND={config.backend} needs the package {error.name} in an environment of its own: "
                f"`make bench BACKEND={config.backend}` installs it into {sys.prefix}-{config.backend}"
            ) from error
        extra = extra_of(error.name or "")
        if extra is None:
            raise
        raise ConfigError(
            f"BACKEND={config.backend} needs the package {error.name}: "
            f"install the extra with `uv sync --extra {extra}`"
        ) from error
