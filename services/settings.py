"""Every setting of the service, in one frozen object that `services.read_settings` reads once.

A setting's description is its text in `.env.example`. The options of backends and strategies are not written
here: they join the settings under their own names, and reach the backend or the strategy as the object that
declares them.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, SecretStr, create_model, field_validator, model_validator

from adapters.base import BackendConfig, ConfigError, Scheduling
from adapters.cores import default_threads
from adapters.registry import BACKENDS, check_backend, check_scheduling
from services.engine.policies import Policies
from services.engine.spec import EngineSpec, PadStyle
from services.logs import LogFormat, LogLevel
from services.strategies import VARIANTS, resolve_variant
from services.strategies.base import StrategyConfig

SECRETS = ("api_key",)

_BACKEND = BackendConfig()
_ENGINE = EngineSpec(variant="continuous")
_LONG = [
    f"{tokens} with {name} on {device}"
    for name, description in BACKENDS.items()
    for device, tokens in description.long_prefill_token_thresholds.items()
]
_SCHEDULING = ", ".join(name for name, backend in BACKENDS.items() if backend.make_scheduling)
_OF_THE_LABS_SCHEDULER = (
    "variant", "batch_wait_ms", "pad_finished", "pad_style", "prefill_chunk", "long_prefill_token_threshold",
    "schedule_tick_ms", "aging_s",
)  # fmt: skip
_DTYPES = [f"{name}: {backend.dtypes}." for name, backend in BACKENDS.items() if backend.dtypes]

Milliseconds = Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class Settings(BaseModel):
    """Use `read_settings`: the object that it returns has the backends' options as well."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str = Field(_ENGINE.variant, description=f"Batching strategy: {', '.join(VARIANTS)}.")
    backend: str = Field(
        _BACKEND.backend,
        description=f"What computes: {', '.join(BACKENDS)} (null: no weights, a cost model).",
    )
    model: str = Field(
        _BACKEND.model,
        min_length=1,
        description="A seeded preset (lab-26m, lab-110m, lab-1b, lab-8b), smollm2-135m (real text), a hub id "
        "or a local folder; a format may follow, as in lab-110m:bf16. llama_cpp also takes a .gguf file, "
        "here or on the hub (owner/repository/file.gguf).",
    )
    device: str = Field(
        _BACKEND.device,
        description="auto (cuda if there is one, else cpu), cpu, cuda, cuda:N or mps (not verified).",
    )
    dtype: str = Field(
        _BACKEND.dtype,
        description="auto, fp32, bf16 or fp16. auto takes bf16 where the device computes it natively, or "
        f"where the compiled CPU kernels do, else fp32. {' '.join(_DTYPES)}",
    )
    n_threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Engine threads. Unset: physical cores - 1, at least one, so that the API keeps a core.",
    )
    artifacts_dir: str = Field(
        _BACKEND.artifacts_dir, min_length=1, description="Where models are made and kept."
    )
    model_wait_s: Seconds | None = Field(
        _BACKEND.model_wait_s,
        description="How long a starting server waits for a local MODEL that is not there yet. Unset: 600 s "
        "while `lab model stage` is at work on it, and not at all otherwise.",
    )

    max_batch: int = Field(_BACKEND.max_batch_size, ge=1, le=4096, description="Sequences that run together.")
    scheduling: Scheduling = Field(
        _ENGINE.scheduling,
        description="Who decides what a step carries: lab, a strategy of the lab; or engine, the scheduler "
        f"that the backend's engine has of its own ({_SCHEDULING}), to see what the lab's costs. VARIANT "
        "stays continuous then, and no setting of the lab's scheduler may be given.",
    )
    batch_wait_ms: Milliseconds = Field(
        StrategyConfig().batch_wait_s * 1000,
        description="dynamic: how long the oldest request waits at most for a fuller batch.",
    )
    pad_finished: bool = Field(
        _ENGINE.pad_finished,
        description="static, dynamic: finished rows stay in the batch, computed for nothing, until its last "
        "row is done, as padded generate() stacks do. 0 drops them.",
    )
    pad_style: PadStyle = Field(
        _ENGINE.pad_style,
        description="static, dynamic: generate also computes the padding of prompts to the longest of their "
        "batch and lets finished rows grow, so that steps take what those of padded generate() do. lean: "
        "prompts are not padded, finished rows compute their last position again.",
    )
    prefill_chunk: int = Field(
        _BACKEND.prefill_chunk,
        ge=1,
        le=65_536,
        description="Prompts are cut at multiples of this many tokens, and computed chunk by chunk between "
        "decode steps.",
    )
    long_prefill_token_threshold: int | None = Field(
        None,
        ge=0,
        le=10_000_000,
        description="continuous: while others decode, prompts of more tokens than this get PREFILL_CHUNK "
        "tokens a step for each of them, so that they delay the next token of the others by little. "
        f"0: never so. Unset: {', '.join(_LONG)}, else 0.",
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Tokens computed in one step, at least MAX_BATCH + PREFILL_CHUNK. Unset: "
        f"{_BACKEND.max_step_tokens}, or that sum if it is more.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        le=10_000_000,
        description="Longest prompt and answer together, in tokens. Unset: the model's own, at most 4096; "
        "torch on CUDA lowers it to what fits MAX_BATCH times into KV_MEMORY_FRACTION. A given length that "
        "does not fit is an error.",
    )
    kv_memory_fraction: float = Field(
        _BACKEND.kv_memory_fraction,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="llama_cpp, and torch on CUDA: share of the free memory (of the accelerator, if layers "
        "run there; the weights are loaded before it is counted) that keys and values may take.",
    )
    aging_s: Seconds = Field(
        _ENGINE.aging_s,
        description="fcfs, sjf: each time this many seconds pass, a waiting request gains one priority level "
        "or 128 predicted tokens. 0: no priorities, and the shortest first whatever waits.",
    )
    schedule_tick_ms: Milliseconds = Field(
        _ENGINE.tick_s * 1000, description="Least time between the starts of two steps."
    )
    max_queue: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="Requests that may wait for a slot, and prompts of all of them together. More are "
        "refused with 429 and Retry-After; where nothing waits, a request may have any number of prompts.",
    )
    max_queue_tokens: int = Field(
        262_144,
        ge=1,
        le=1_000_000_000,
        description="Prompt tokens that may wait for a first token, over all requests. Beyond them 429 as "
        "well; a request that finds nothing waiting is taken at any length that fits the model.",
    )
    max_timeout_s: float = Field(
        3600.0,
        gt=0,
        le=86_400,
        allow_inf_nan=False,
        description="The longest that a request may take, in seconds; then it ends with 504. A request's own "
        "timeout_s can only be shorter.",
    )

    max_tokens: int = Field(128, ge=1, le=1_000_000, description="Tokens to generate at most.")
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False, description="1 is off.")
    top_k: int = Field(0, ge=0, le=1_000_000, description="0 is off.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Unset: drawn for each request.")

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65_535, description="0 takes a free port and logs it.")
    max_connections: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Connections that may be open. A further one takes the place of one without a request; "
        "where there is none, it gets 503, and /health its answer. Unset: what the limit of open files "
        "leaves, at most 8192.",
    )
    engine_process: bool = Field(
        True,
        description="The engine runs in its own process. 0 runs it in a thread of the API's process, for "
        "debugging.",
    )
    heartbeat_timeout_s: Seconds = Field(
        _ENGINE.heartbeat_timeout_s,
        description="An engine process that gives no sign of life for this many seconds is killed and "
        "started again. It beats twice a second beside its steps, however long they are. 0: never.",
    )
    step_timeout_s: Seconds = Field(
        _ENGINE.step_timeout_s,
        description="So is one that computes at a single step for this long. 0: a step may take any time.",
    )
    slow_reader_timeout_s: Seconds = Field(
        30.0,
        description="A stream is cut off when its client takes nothing for this many seconds. 0: never.",
    )
    max_unread_tokens: int = Field(
        65_536, ge=0, description="So is one whose client lets this many tokens wait. 0: any number."
    )
    api_key: SecretStr | None = Field(
        None,
        min_length=8,
        description="Wanted as `Authorization: Bearer KEY` on all paths but /health. Never logged. Unset: no "
        "key is asked for.",
    )
    drain_timeout_s: Seconds = Field(
        30.0, description="After the first SIGTERM, how long accepted requests may still take."
    )
    log_level: LogLevel = Field(_ENGINE.log_level, description="DEBUG, INFO, WARNING or ERROR.")
    log_format: LogFormat = Field(
        _ENGINE.log_format, description="console, or json: one object a line, with the id of each request."
    )

    @field_validator("variant")
    @classmethod
    def _canonical_variant(cls, name: str) -> str:
        return resolve_variant(name)

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, name: str) -> str:
        check_backend(name)
        return name

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, level: Any) -> Any:
        return level.upper() if isinstance(level, str) else level

    @model_validator(mode="after")
    def _known_policies(self) -> Settings:
        Policies(**self._named_in(Policies))
        return self

    @model_validator(mode="after")
    def _engine_schedules_alone(self) -> Settings:
        if self.scheduling == "engine":
            check_scheduling(self.backend)
            known = type(self).model_fields
            names = (*_OF_THE_LABS_SCHEDULER, *(name for name in option_fields(Policies) if name in known))
            if given := [name.upper() for name in names if getattr(self, name) != known[name].default]:
                listed = ", ".join(given)
                raise ConfigError(
                    f"SCHEDULING=engine leaves nothing to the lab's scheduler: {listed} must stay unset"
                )
        return self

    @model_validator(mode="after")
    def _step_holds_batch_and_chunk(self) -> Settings:
        least = self.max_batch + self.prefill_chunk
        if self.max_step_tokens is not None and self.max_step_tokens < least:
            raise ConfigError(
                f"MAX_STEP_TOKENS is {self.max_step_tokens}, but a full batch and one prompt chunk need "
                f"MAX_BATCH + PREFILL_CHUNK = {least}: raise it, or leave it unset"
            )
        return self

    @property
    def num_threads(self) -> int:
        return self.n_threads or default_threads()

    @property
    def step_tokens(self) -> int:
        return self.max_step_tokens or max(_BACKEND.max_step_tokens, self.max_batch + self.prefill_chunk)

    def engine_spec(self) -> EngineSpec:
        """What the engine is built from, wherever it runs. Settings go in under their own names."""
        options = BACKENDS[self.backend].options
        backend = self._named_in(BackendConfig) | {
            "num_threads": self.num_threads,
            "max_batch_size": self.max_batch,
            "max_step_tokens": self.step_tokens,
            "options": options(**self._named_in(options)),
        }
        own = {name: getattr(self, name) for name in option_fields(StrategyConfig)}
        engine = self._named_in(EngineSpec) | {
            "backend": BackendConfig(**backend),
            "policies": Policies(**self._named_in(Policies)),
            "strategy_settings": {"batch_wait_s": self.batch_wait_ms / 1000, **own},
            "tick_s": self.schedule_tick_ms / 1000,
        }
        return EngineSpec(**engine)

    def _named_in(self, kind: type[Any]) -> dict[str, Any]:
        """The values of the settings that a dataclass has fields for."""
        known = type(self).model_fields
        return {field.name: getattr(self, field.name) for field in fields(kind) if field.name in known}

    def resolved(self) -> dict[str, str | int | float | bool | None]:
        """Every setting with the value in force; what is left to the model is None, a secret is masked."""
        masked = {name: "***" for name in SECRETS if getattr(self, name) is not None}
        derived = {"n_threads": self.num_threads, "max_step_tokens": self.step_tokens}
        return self.model_dump() | derived | masked


def option_fields(kind: type[Any]) -> dict[str, Any]:
    """The `option` fields of a dataclass as pydantic takes them: name to type and field."""
    types = get_type_hints(kind)
    return {
        field.name: (
            types[field.name],
            Field(field.default, description=field.metadata["help"], **field.metadata["limits"]),
        )
        for field in fields(kind)
        if field.metadata
    }


def all_settings() -> type[Settings]:
    """The settings with the options of strategies and of every backend that is registered now."""
    return _with_options((StrategyConfig, Policies, *(backend.options for backend in BACKENDS.values())))


@cache
def _with_options(kinds: tuple[type[Any], ...]) -> type[Settings]:
    found: dict[str, Any] = {}
    for kind in kinds:
        for name, field in option_fields(kind).items():
            assert name not in found.keys() | Settings.model_fields.keys(), f"{name} is a setting twice"
            found[name] = field
    return create_model("Settings", __base__=Settings, **found)
