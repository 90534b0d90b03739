"""What a measurement is asked to do: read once, from the command line, the environment and `.env`.

What enters are plain names (`REQUESTS`, `CONCURRENCY`, `RATE`, ...); what leaves is one frozen object.
Settings of the service (`MAX_BATCH`, `N_THREADS`, ...) are not read here: the service that is started
inherits the environment and reads them itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters.base import ConfigError
from adapters.registry import check_backend

# Options of the command line in the order of `--help`: (name, help). Each is also an environment
# variable of the same name in capitals.
OPTIONS = (
    ("variant", "strategy to serve (default continuous); with --url only a label"),
    ("backend", "backend of the service: torch, llama_cpp, null"),
    ("model", "preset, hub id, folder or file that the service loads; with --url the name to ask for"),
    ("requests", "prompts to send (default 64)"),
    ("concurrency", "virtual users of the closed loop (default 16)"),
    ("rate", "requests a second; makes the loop open"),
    (
        "arrivals",
        "of an open loop: poisson (default), constant, gamma (CV), onoff (ON_S, OFF_S), ramp (RATE_FROM)",
    ),
    ("cv", "gamma: coefficient of variation of the gaps; 1 is Poisson, above it bursts"),
    ("on_s", "onoff: seconds of a burst"),
    ("off_s", "onoff: seconds of silence after it"),
    ("rate_from", "ramp: where the rate begins (default 0); RATE is its mean"),
    ("trace", "replay the arrivals and lengths of a trace: Azure CSV, Mooncake JSON lines, BurstGPT CSV"),
    ("time_scale", "trace: multiply its times (default 1; 0.1 is ten times as fast)"),
    ("trace_max_tokens", "trace: leave out rows of more tokens than this"),
    ("seed", "seed of arrival times and sampling (default 0)"),
    ("repeats", "replays of the same schedule, each against a fresh service (default 1)"),
    ("out", "folder of the results (default results)"),
    ("url", "measure a server that already runs (any OpenAI-compatible one) instead of starting ours"),
    ("temperature", "0 is greedy (default)"),
    ("corpus", "prompts to replay (default data/prompts.jsonl), or synthetic:PROMPTxOUTPUT in tokens"),
    ("warmup", "warm-up prompts before the measured ones (default: concurrency, at most 16)"),
    ("request_timeout_s", "longest wait for one request (default 600)"),
    ("floor", "0 skips measuring the harness against a server that answers at once, before the first run"),
    ("start_timeout_s", "longest wait for the service to be ready (default 900)"),
    ("processes", "processes of the harness that send the load together (default 1)"),
    ("shard", "send part i of N only, as 0/3; all parts merge into the whole with `lab merge`"),
    ("start_at", "instant at which every shard begins, in seconds since 1970 (see `date +%%s`)"),
    ("max_in_flight", "open loop: prompts in flight at which the run gives up as INVALID (default 1024)"),
)


class HarnessSettings(BaseSettings):
    """Every setting of `lab bench` and `lab compare`; an empty variable counts as not set."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    variant: str | None = Field(None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    backend: str | None = None
    model: str | None = None
    requests: int = Field(64, ge=1)
    concurrency: int = Field(16, ge=1)
    rate: float | None = None
    arrivals: str | None = None
    cv: float | None = None
    on_s: float | None = None
    off_s: float | None = None
    rate_from: float | None = None
    trace: Path | None = None
    time_scale: float | None = Field(None, gt=0)
    trace_max_tokens: int | None = Field(None, ge=2)
    seed: int = Field(0, ge=0)
    repeats: int = Field(1, ge=1)
    out: Path = Path("results")
    url: str | None = None
    temperature: float = Field(0.0, ge=0, le=2)
    corpus: Path | None = None
    warmup: int | None = Field(None, ge=0)
    request_timeout_s: float = Field(600.0, gt=0)
    floor: bool = True
    start_timeout_s: float = Field(900.0, gt=0)
    max_in_flight: int = Field(1024, ge=1)
    processes: int = Field(1, ge=1, le=256)
    shard: str | None = Field(None, pattern=r"^[0-9]+/[0-9]+$")
    shards: int | None = Field(None, ge=1)
    """With JOB_COMPLETION_INDEX, as an indexed job of Kubernetes sets it: this shard is INDEX/SHARDS."""
    job_completion_index: int | None = Field(None, ge=0)
    start_at: float | None = Field(None, gt=0)
    api_key: SecretStr | None = None
    """Sent as a bearer token; from the environment only, and never recorded."""

    @property
    def num_warmup(self) -> int:
        return min(16, self.concurrency) if self.warmup is None else self.warmup

    def which_shard(self) -> tuple[int, int]:
        """Which part of how many.

        Raises:
            ConfigError: there is no such part.
        """
        text = self.shard
        if text is None and self.shards is not None and self.job_completion_index is not None:
            text = f"{self.job_completion_index}/{self.shards}"
        if text is None:
            return 0, 1
        index, of = map(int, text.split("/"))
        if of < 1:
            raise ConfigError(f"SHARD={text}: there must be at least 1 part")
        if index >= of:
            raise ConfigError(f"SHARD={text}: parts of {of} are numbered 0 to {of - 1}")
        return index, of

    def recorded(self) -> dict[str, Any]:
        """The settings as the manifest keeps them."""
        return self.model_dump(mode="json", exclude={"api_key"})


def add_setting_options(parser: argparse.ArgumentParser, *, leave_out: frozenset[str] = frozenset()) -> None:
    for name, text in OPTIONS:
        if name not in leave_out:
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, dest=name, default=None, metavar="VALUE", help=text)


def read_settings(args: argparse.Namespace) -> HarnessSettings:
    """Command line over environment over `.env`.

    Raises:
        ConfigError: a value cannot be used; the message names the setting.
    """
    names = {name for name, _ in OPTIONS}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    try:
        settings = HarnessSettings(**{name: value for name, value in given.items() if value != ""})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]).upper()
        raise ConfigError(f"{name}={first['input']}: {first['msg']}") from error
    if settings.backend:
        check_backend(settings.backend)
    return settings
