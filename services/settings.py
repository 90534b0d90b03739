"""Every setting of the service, in one frozen object that is read once.

What enters are the environment, a `.env` file and overrides from the command line (the last one wins);
what leaves is `Settings` and the configurations that backend, strategy and scheduler are built from.
A name in `.env` that is no setting, of the service or of a measurement, is an error. Names that related
tools use are accepted as aliases.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from adapters.base import BackendConfig, ConfigError
from adapters.cores import default_threads
from adapters.registry import BACKENDS, check_backend
from services.engine.spec import EngineSpec
from services.logs import LogFormat
from services.strategies import VARIANTS, resolve_variant
from services.strategies.base import StrategyConfig

ALIASES: dict[str, str] = {
    "model_path": "model",
    "artifact_model_dir": "model",
    "hf_model": "model",
    "max_batch_size": "max_batch",
    "max_wait_ms": "batch_wait_ms",
    "max_new_tokens": "max_tokens",
    "artifact_dir": "artifacts_dir",
}
"""Where both are set, the setting's own name counts; of several aliases, the first one listed here."""

MEASUREMENT_NAMES = (
    *("requests", "concurrency", "rate", "arrivals", "cv", "on_s", "off_s", "rate_from"),
    *("trace", "time_scale", "trace_max_tokens", "repeats", "out", "url", "corpus", "warmup"),
    *("request_timeout_s", "floor", "start_timeout_s", "max_in_flight", "processes"),
    *("shard", "shards", "job_completion_index", "start_at"),
)
"""What `lab bench` and `lab compare` read from the same `.env`; the service passes it over."""

_DEFAULT_STEP_TOKENS = 512
_SECRETS = ("api_key",)

Milliseconds = Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_file=".env")

    variant: str = Field("continuous", description=f"Batching strategy: {', '.join(VARIANTS)}.")
    backend: str = Field("torch", description=f"What computes: {', '.join(BACKENDS)} (null: a cost model).")
    model: str = Field(
        "lab-26m",
        min_length=1,
        description="A preset (lab-26m, lab-110m, lab-1b, lab-8b), a hub id, a local folder or a .gguf file.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    dtype: str = Field(
        "auto",
        description="auto, fp32, bf16 or fp16; auto: what the device does natively, q4_k_m for llama_cpp.",
    )
    n_threads: int | None = Field(
        None, ge=1, le=1024, description="Engine threads; unset: physical cores - 1, at least one."
    )
    n_gpu_layers: int | None = Field(
        None, ge=-1, description="llama_cpp: layers on the accelerator; unset: all, where the build has one."
    )
    n_batch: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="llama_cpp: tokens of one decode call; raised to what a step needs.",
    )
    n_ubatch: int | None = Field(
        None, ge=1, le=1_000_000, description="llama_cpp: tokens computed together; unset: 512."
    )
    kv_type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0"] = Field(
        "auto", description="llama_cpp: number format of keys and values; auto: f16, or f32 for f32 weights."
    )

    max_batch: int = Field(16, ge=1, le=4096, description="Sequences that run together.")
    batch_wait_ms: Milliseconds = Field(50.0, description="dynamic: longest wait for a fuller batch.")
    pad_finished: bool = Field(
        True, description="static, dynamic: finished rows stay in the batch until its last one is done."
    )
    prefill_chunk: int = Field(16, ge=1, le=65_536, description="Prompts are cut at multiples of this.")
    long_prefill_token_threshold: int | None = Field(
        None,
        ge=0,
        le=10_000_000,
        description="continuous: while others decode, prompts of more tokens than this get PREFILL_CHUNK "
        "tokens a step for each of them; 0: never so; unset: 256 with torch on a CPU, else 0.",
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Tokens computed in one step; unset: 512, or MAX_BATCH + PREFILL_CHUNK if that is more.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        le=10_000_000,
        description="Longest prompt and answer in tokens; unset: the model's own, at most 4096.",
    )
    cpu_kernels: bool = Field(
        True, description="torch on a CPU: compile what a step does if there is a C++ compiler."
    )
    cuda_graphs: bool = Field(True, description="torch on CUDA: replay decode steps as graphs.")
    batch_invariant: bool = Field(
        False, description="torch on CUDA: same tokens whatever the batch, slower; always so on a CPU."
    )
    kv_memory_fraction: float = Field(
        0.8, gt=0, le=1, allow_inf_nan=False, description="Share of free memory for keys and values."
    )
    aging_s: Seconds = Field(
        10.0, description="A waiting request gains one priority level in this time; 0 ignores priorities."
    )
    schedule_tick_ms: Milliseconds = Field(0.0, description="Least time between the starts of two steps.")

    max_queue: int = Field(256, ge=1, le=1_000_000, description="Requests that may wait; more get a 429.")
    max_queue_tokens: int = Field(
        262_144, ge=1, le=1_000_000_000, description="Prompt tokens that may wait; beyond them a 429."
    )
    max_timeout_s: float = Field(
        3600.0, gt=0, le=86_400, allow_inf_nan=False, description="Longest a request may take; then a 504."
    )
    max_tokens: int = Field(128, ge=1, le=1_000_000, description="max_tokens where none is sent.")
    temperature: float = Field(
        0.0, ge=0, le=2, allow_inf_nan=False, description="temperature where none is sent; 0 is greedy."
    )
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False, description="top_p where none is sent.")
    top_k: int = Field(0, ge=0, le=1_000_000, description="top_k where none is sent; 0 is off.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed where none is sent; unset: drawn for each request."
    )

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0: a free one, logged.")
    engine_process: bool = Field(True, description="The engine runs in its own process; 0: inside the API's.")
    heartbeat_timeout_s: Seconds = Field(
        10.0, description="An engine process that is silent for this long is replaced; 0: never."
    )
    step_timeout_s: Seconds = Field(
        300.0, description="So is one whose step takes longer than this; 0: steps may take any time."
    )
    slow_reader_timeout_s: Seconds = Field(
        30.0, description="A stream is cut off when its client takes nothing for this long; 0: never."
    )
    max_unread_tokens: int = Field(
        65_536, ge=0, description="... or when this many tokens wait for it; 0: any number."
    )
    api_key: SecretStr | None = Field(
        None, min_length=8, description="Wanted as a bearer token on all paths but /health; unset: no key."
    )
    drain_timeout_s: Seconds = Field(30.0, description="How long accepted requests may take after SIGTERM.")
    artifacts_dir: str = Field("artifacts", min_length=1, description="Where models are made and kept.")
    model_wait_s: Seconds | None = Field(
        None,
        description="Longest wait for a local model to be staged; unset: 600 s if that goes on, else 0.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level logged.")
    log_format: LogFormat = Field("console", description="console, or json: one object a line.")

    null_step_ms: Milliseconds = Field(0.0, description="null backend: fixed cost of a step.")
    null_row_ms: Milliseconds = Field(0.0, description="null backend: cost of each decode row.")
    null_prompt_token_ms: Milliseconds = Field(0.0, description="null backend: cost of each prompt token.")

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
    def _step_holds_batch_and_chunk(self) -> Settings:
        least = self.max_batch + self.prefill_chunk
        if self.max_step_tokens is not None and self.max_step_tokens < least:
            raise ConfigError(
                f"MAX_STEP_TOKENS is {self.max_step_tokens}, but a full batch and one prompt chunk need "
                f"MAX_BATCH + PREFILL_CHUNK = {least}: raise it, or leave it unset"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        env_file = getattr(dotenv_settings, "env_file", None)
        return init_settings, _Environment(settings_cls), _EnvFile(settings_cls, env_file=env_file)

    @property
    def step_tokens(self) -> int:
        return self.max_step_tokens or max(_DEFAULT_STEP_TOKENS, self.max_batch + self.prefill_chunk)

    @property
    def num_threads(self) -> int:
        return self.n_threads or default_threads()

    def engine_spec(self) -> EngineSpec:
        """What the engine is built from, wherever it runs."""
        return EngineSpec(
            variant=self.variant,
            backend=BackendConfig(
                backend=self.backend,
                model=self.model,
                device=self.device,
                dtype=self.dtype,
                num_threads=self.num_threads,
                max_batch_size=self.max_batch,
                max_step_tokens=self.step_tokens,
                prefill_chunk=self.prefill_chunk,
                max_model_len=self.max_model_len,
                artifacts_dir=self.artifacts_dir,
                model_wait_s=self.model_wait_s,
                cpu_kernels=self.cpu_kernels,
                cuda_graphs=self.cuda_graphs,
                batch_invariant=self.batch_invariant,
                kv_memory_fraction=self.kv_memory_fraction,
                n_gpu_layers=self.n_gpu_layers,
                n_batch=self.n_batch,
                n_ubatch=self.n_ubatch,
                kv_type=self.kv_type,
                null_step_s=self.null_step_ms / 1000,
                null_row_s=self.null_row_ms / 1000,
                null_prompt_token_s=self.null_prompt_token_ms / 1000,
            ),
            strategy=StrategyConfig(max_batch=self.max_batch, batch_wait_s=self.batch_wait_ms / 1000),
            prefill_chunk=self.prefill_chunk,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            pad_finished=self.pad_finished,
            aging_s=self.aging_s,
            tick_s=self.schedule_tick_ms / 1000,
            log_level=self.log_level,
            log_format=self.log_format,
            silence_limit_s=self.heartbeat_timeout_s,
            step_limit_s=self.step_timeout_s,
        )

    def resolved(self) -> dict[str, str | int | float | bool | None]:
        """Every setting with the value in force; what is left to the model is None, a secret is masked."""
        masked = {name: "***" for name in _SECRETS if getattr(self, name) is not None}
        derived = {"n_threads": self.num_threads, "max_step_tokens": self.step_tokens}
        return self.model_dump() | derived | masked


class _Environment(EnvSettingsSource):
    def __call__(self) -> dict[str, Any]:
        return _by_setting(self.env_vars)


class _EnvFile(DotEnvSettingsSource):
    def __call__(self) -> dict[str, Any]:
        for name in self.env_vars:
            _check_known(name, "in .env", MEASUREMENT_NAMES)
        return _by_setting(self.env_vars)


def read_settings(
    overrides: Mapping[str, Any] | None = None, env_file: str | Path | None = ".env"
) -> Settings:
    """Read `overrides` (names in any case, aliases too), the environment and `env_file`, in this order.

    Raises:
        ConfigError: naming each setting that is unknown or has a value that cannot work.
    """
    lowered = {name.lower(): value for name, value in (overrides or {}).items()}
    for name in lowered:
        _check_known(name, "given")
    try:
        return Settings(_env_file=env_file, **_by_setting(lowered))  # type: ignore[call-arg]
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors(include_url=False)]
        raise ConfigError("; ".join(problems)) from error


def _check_known(name: str, where: str, others: Iterable[str] = ()) -> None:
    """Raises: ConfigError for a name that is neither a setting nor one of `others`."""
    settings = [*Settings.model_fields, *ALIASES]
    known = [*settings, *others]
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0].upper()}?" if near else f" (.env.example lists all {len(settings)})"
    raise ConfigError(f"{name.upper()}, {where}, is not a setting{hint}")


def _by_setting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what names a setting, under the setting's own name."""
    given = {name: value for name, value in values.items() if value not in (None, "")}
    found = {target: given[alias] for alias, target in reversed(ALIASES.items()) if alias in given}
    return found | {name: given[name] for name in Settings.model_fields if name in given}


def _problem(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"]).upper()
    message = item["msg"].replace("Input should be", "must be")
    got = "" if name.lower() in _SECRETS else f" (it is {item['input']!r})"
    return f"{name} {message[:1].lower()}{message[1:]}{got}"
