"""How a backend describes itself. Readable before any of the backend's packages is installed.

Settings, command line, Makefile and `.env.example` take what they say of a backend from its description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

HF_FORMATS = {"fp32": "fp32", "f32": "fp32", "bf16": "bf16", "fp16": "fp16", "f16": "fp16"}
"""Of a Hugging Face folder: what may follow the colon of MODEL, and how backends spell it."""
GGUF_FORMATS = {name: name for name in ("bf16", "f16", "f32", "q4_1", "q4_k_m", "q8_0")}

ValueT = TypeVar("ValueT")


def option(default: ValueT, help: str, **limits: Any) -> ValueT:
    """A dataclass field that becomes a setting of its name; `limits` are pydantic's (ge, lt, ...)."""
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Of a backend that has no settings of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendDescription:
    """`make` and `tokenizer` name callables, `module:callable`, that take a `BackendConfig`."""

    make: str
    """Loads the model and returns a `Backend`."""
    tokenizer: str | None = None
    """Returns the model's `Tokenizer`; None: that of a Hugging Face folder. The HTTP process calls it, so it
    should not import the engine."""
    extra: str | None = None
    """The extra of this project that brings the packages. The Makefile reads this line."""
    own_environment: bool = False
    """The packages cannot be installed beside the others': `adapters/<name>_backend` is a project with a lock
    of its own, installed into `.venv-<name>`. The Makefile reads this line."""
    packages: tuple[str, ...] = ()
    """The packages of the extra or of the environment, as Python imports them."""
    options: type[Any] = NoOptions
    """A dataclass of `option` fields. A name belongs to one backend only."""
    weights: Literal["folder", "gguf", "none"] = "folder"
    """What it loads: a Hugging Face folder, a GGUF file, or no model at all."""
    formats: Mapping[str, str] = field(default_factory=lambda: HF_FORMATS)
    """What may follow the colon of MODEL, and the backend's spelling of it."""
    dtypes: str = ""
    """What DTYPE means to it, where that is not what it means to torch; DTYPE's own help says it."""
    long_prefill_token_thresholds: Mapping[str, int] = field(default_factory=dict)
    """LONG_PREFILL_TOKEN_THRESHOLD where it is unset, by kind of device; 0 for a device that is not here."""
    make_scheduling: str | None = None
    """As `make`, for SCHEDULING=engine: returns a `SchedulingEngine`. None: it has no scheduler."""
