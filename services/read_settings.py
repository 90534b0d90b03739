"""Where the settings come from: the command line, then the environment, then `.env`.

An empty value counts as none. A name in `.env` that nothing reads is an error; in the environment it is not,
since others use that as well.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, DotEnvSettingsSource

from adapters.base import ConfigError
from adapters.dotenv import reading_dotenv
from services.settings import SECRETS, Settings, all_settings

ALIASES: dict[str, str] = {
    "model_path": "model",
    "artifact_model_dir": "model",
    "hf_model": "model",
    "max_batch_size": "max_batch",
    "max_wait_ms": "batch_wait_ms",
    "max_new_tokens": "max_tokens",
    "artifact_dir": "artifacts_dir",
}
"""Names of related tools. A setting's own name counts before them; of several aliases, the first one here."""


def read_settings(
    overrides: Mapping[str, Any] | None = None,
    env_file: str | Path | None = ".env",
    passed_over: Collection[str] = (),
) -> Settings:
    """Read `overrides` (names in any case, aliases too), the environment and `env_file`, in this order.

    `passed_over` are names that others read from the same file.

    Raises:
        ConfigError: naming each setting that is unknown or has a value that cannot work, or `env_file`.
    """
    kind = all_settings()
    given = {name.lower(): value for name, value in (overrides or {}).items()}
    for name in given:
        _check_known(name, "given", kind)
    with reading_dotenv():
        in_file = DotEnvSettingsSource(BaseSettings, env_file=env_file).env_vars
    for name in in_file:
        _check_known(name, "in .env", kind, passed_over)
    environment = {name.lower(): value for name, value in os.environ.items()}
    values = [_by_setting(source, kind) for source in (in_file, environment, given)]
    try:
        return kind(**(values[0] | values[1] | values[2]))
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors(include_url=False)]
        raise ConfigError("; ".join(problems)) from error


def _check_known(name: str, where: str, kind: type[Settings], passed_over: Iterable[str] = ()) -> None:
    """Raises: ConfigError for a name that is neither a setting nor one of `passed_over`."""
    settings = [*kind.model_fields, *ALIASES]
    known = [*settings, *passed_over]
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0].upper()}?" if near else f" (.env.example lists all {len(settings)})"
    raise ConfigError(f"{name.upper()}, {where}, is not a setting{hint}")


def _by_setting(values: Mapping[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """Keep what names a setting, under the setting's own name."""
    given = {name: value for name, value in values.items() if value not in (None, "")}
    found = {target: given[alias] for alias, target in reversed(ALIASES.items()) if alias in given}
    return found | {name: given[name] for name in kind.model_fields if name in given}


def _problem(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"]).upper()
    message = item["msg"].replace("Input should be", "must be")
    got = "" if name.lower() in SECRETS else f" (it is {item['input']!r})"
    return f"{name} {message[:1].lower()}{message[1:]}{got}"
