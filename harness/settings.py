"""The settings of the harness, from the command line, the environment and `.env`.

Settings of the service (`MAX_BATCH`, `N_THREADS`, ...) are not read here: the service that is started
inherits the environment and reads them itself. It passes over `SETTING_NAMES` in `.env`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters.base import ConfigError
from adapters.dotenv import reading_dotenv
from adapters.registry import BACKENDS, check_backend

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
_ENVIRONMENT_ONLY = ("shards", "job_completion_index", "api_key")


class HarnessSettings(BaseSettings):
    """Every setting of `lab bench` and `lab compare`; an empty variable counts as not set."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    variant: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="strategy to serve (default continuous); with --url only a label",
    )
    backend: str | None = Field(None, description=f"backend of the service: {', '.join(BACKENDS)}")
    model: str | None = Field(
        None,
        description="preset, hub id, folder or file that the service loads; with --url the name to ask for",
    )
    requests: int = Field(
        64,
        ge=1,
        description="prompts to send; where not given, `bench` sizes a closed loop to 15 to 25 s, "
        "and `compare` all that it measures to ten minutes",
    )
    concurrency: int = Field(16, ge=1, description="virtual users of the closed loop")
    think_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="closed loop: mean time that a user thinks between an answer and the next request",
    )
    think: Literal["exponential", "fixed"] | None = Field(
        None, description="how think times are spread: exponential (default) or fixed"
    )
    ramp_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="closed loop: users begin one after the other within so many seconds, not all at once",
    )
    rate: float | None = Field(None, description="requests a second; makes the loop open")
    arrivals: str | None = Field(
        None,
        description="of an open loop: poisson (default), constant, gamma (CV), onoff (ON_S, OFF_S), ramp "
        "(RATE_FROM)",
    )
    cv: float | None = Field(
        None, description="gamma: coefficient of variation of the gaps; 1 is Poisson, above it bursts"
    )
    on_s: float | None = Field(None, description="onoff: seconds of a burst")
    off_s: float | None = Field(None, description="onoff: seconds of silence after it")
    rate_from: float | None = Field(
        None, description="ramp: where the rate begins (default 0); RATE is its mean"
    )
    trace: Path | None = Field(
        None,
        description="replay the arrivals and lengths of a trace: Azure CSV, Mooncake JSON lines, "
        "BurstGPT CSV",
    )
    time_scale: float | None = Field(
        None, gt=0, description="trace: multiply its times (default 1; 0.1 is ten times as fast)"
    )
    trace_max_tokens: int | None = Field(
        None, ge=2, description="trace: leave out rows of more tokens than this"
    )
    seed: int = Field(0, ge=0, description="seed of arrival times and sampling")
    loads: str | None = Field(
        None,
        description="of `compare`: closed, and open loops at shares of the reference arm's capacity "
        "(default: closed 0.75, or the one load that RATE, ARRIVALS or TRACE names)",
    )
    capacity: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="requests a second that LOADS are shares of; where not given, measured briefly and told, "
        "so that it can be given to have the same schedules again",
    )
    quick: bool = Field(
        False,
        description="1: `compare` does one block, padding on, in about three minutes: a first look, without "
        "intervals",
    )
    draws: Literal["new", "same"] = Field(
        "new",
        description="of `compare`: new gives each block another sample of the corpus and other arrivals, "
        "shared by its arms; same replays one list in all",
    )
    repeats: int = Field(1, ge=1, description="replays of the same schedule, each against a fresh service")
    out: Path = Field(Path("results"), description="folder of the results")
    url: str | None = Field(
        None,
        repr=False,
        description="measure a server that already runs (any OpenAI-compatible one) instead of starting ours",
    )
    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy")
    ignore_eos: bool = Field(
        True,
        description="0 lets the model end its answers: max_tokens is then a cap, and lengths are natural",
    )
    corpus: Path | None = Field(
        None,
        description="prompts to replay (default data/prompts.jsonl), instructions "
        "(data/instructions.jsonl, as messages of a chat), or in tokens synthetic:PROMPTxOUTPUT or "
        "synthetic:COMMON+OWNxOUTPUT",
    )
    warmup: int | None = Field(
        None, ge=0, description="warm-up prompts before the measured ones (default: concurrency, at most 16)"
    )
    salt: str | None = Field(
        None,
        min_length=1,
        description="what a number in front of each prompt is drawn from, so that no prefix cache knows it; "
        "0 for none (default: new for every run where the server is not ours, else 0)",
    )
    request_timeout_s: float = Field(600.0, gt=0, description="longest wait for one request")
    floor: bool = Field(
        True,
        description="0 skips measuring the harness against a server that answers at once, before the "
        "first run",
    )
    start_timeout_s: float = Field(900.0, gt=0, description="longest wait for the service to be ready")
    processes: int = Field(
        1, ge=1, le=256, description="processes of the harness that send the load together"
    )
    shard: str | None = Field(
        None,
        pattern=r"^[0-9]+/[0-9]+$",
        description="send part i of N only, as 0/3; all parts merge into the whole with `lab merge`",
    )
    start_at: float | None = Field(
        None, gt=0, description="instant at which every shard begins, in seconds since 1970 (see `date +%s`)"
    )
    max_in_flight: int = Field(
        1024, ge=1, description="open loop: prompts in flight at which the run gives up as INVALID"
    )
    shards: int | None = Field(
        None,
        ge=1,
        description="number of parts, where JOB_COMPLETION_INDEX says which is ours",
    )
    job_completion_index: int | None = Field(None, ge=0, description="set by an indexed job of Kubernetes")
    api_key: SecretStr | None = Field(None, description="sent as a bearer token and never recorded")

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
        """The settings as the manifest keeps them, without a secret."""
        kept = self.model_dump(mode="json", exclude={"api_key"})
        return kept | {"url": self.url and split_login(self.url)[0]}


class ReportSettings(BaseSettings):
    """What a report or an export reads beside its options; an empty variable counts as not set."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True)

    price_per_hour_usd: Annotated[str | None, Field(description="dollars that the machine costs an hour")] = (
        None
    )
    price_per_token_usd: Annotated[str | None, Field(description="... or that an output token costs")] = None
    pushgateway_url: Annotated[
        str | None, Field(repr=False, description="where `lab bench` pushes its summary")
    ] = None


def split_login(url: str) -> tuple[str, str | None]:
    """A URL as it may stand in files, logs and errors, and the `user:password` that stood in it.

    Whatever names a server goes through here before anything else is done with it. Query and fragment, where
    tokens stand as well, are dropped: no request carries them.
    """
    scheme, slashes, rest = url.partition("//")
    if not slashes:
        scheme, rest = "", url
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    end = host.rfind("@")
    if end < 0 and not (slashes and _HOST.fullmatch(host)):
        end = rest.rfind("@")  # a password with a slash in it
    kept = re.split("[?#]", rest[end + 1 :], maxsplit=1)[0]
    return f"{scheme}{slashes}{kept}", unquote(rest[:end]) if end >= 0 else None


SETTING_NAMES = (*HarnessSettings.model_fields, *ReportSettings.model_fields)
"""What may stand in `.env` for the harness; some names the service reads as well."""


def _options() -> dict[str, FieldInfo]:
    return {n: field for n, field in HarnessSettings.model_fields.items() if n not in _ENVIRONMENT_ONLY}


OF_COMPARE = frozenset({"draws", "loads", "capacity", "quick"})
"""Settings that `lab compare` alone reads."""


def add_setting_options(parser: argparse.ArgumentParser, *, leave_out: frozenset[str] = frozenset()) -> None:
    """An option for each setting, in the order in which the settings are declared."""
    for name, field in _options().items():
        if name not in leave_out:
            words = field.description or ""
            if field.default is not None:
                words += f" (default {spelled(field.default)})"
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, dest=name, default=None, metavar="VALUE", help=words.replace("%", "%%"))


def spelled(value: Any) -> str:
    """A default as one writes it in `.env`."""
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, bool | float) else str(value)


def read_settings(args: argparse.Namespace) -> HarnessSettings:
    """Command line over environment over `.env`.

    Raises:
        ConfigError: a value cannot be used; the message names the setting.
    """
    given = {name: value for name in _options() if (value := getattr(args, name, None)) is not None}
    try:
        with reading_dotenv():
            settings = HarnessSettings(**{name: value for name, value in given.items() if value != ""})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]).upper()
        raise ConfigError(f"{name}={first['input']}: {first['msg']}") from error
    if settings.backend:
        check_backend(settings.backend)
    return settings
