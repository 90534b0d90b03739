"""Writes `.env.example` from the settings of the service, its backends and the harness.

With --check it writes nothing and fails where the file is another; `make check` runs it so.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from adapters.registry import BACKENDS
from harness.settings import HarnessSettings, ReportSettings, spelled
from services.read_settings import ALIASES
from services.settings import Settings, all_settings, option_fields
from services.strategies.base import StrategyConfig

PATH = Path(__file__).resolve().parents[1] / ".env.example"
WIDTH = 110
HEAD = """\
# Every setting, with its default. Copy to .env and uncomment what you change. Written by `make env-example`.
# The command line wins (`lab serve` takes --set NAME=VALUE), then the environment, then .env.
# A name that is not here is an error when it stands in .env.
"""
TITLES = {
    "variant": "What is served",
    "max_batch": "Batching",
    "max_tokens": "What a request gets that does not say",
    "host": "The service",
}
"""Titles of sections, each before the first setting of its section."""


def text() -> str:
    """The whole file."""
    return "\n".join([HEAD, *_lines()])


def _lines() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        if name in TITLES:
            yield _title(TITLES[name])
        yield _setting(name, field)
    known = all_settings().model_fields
    kinds: dict[str, type[Any]] = {"Strategies": StrategyConfig}
    kinds |= {f"BACKEND={name}": description.options for name, description in BACKENDS.items()}
    for title, kind in kinds.items():
        yield from _section(title, {name: known[name] for name in option_fields(kind)})
    harness = {**HarnessSettings.model_fields, **ReportSettings.model_fields}
    yield from _section(
        "The harness: what `lab bench`, `lab compare` and reports read",
        {name: field for name, field in harness.items() if name not in Settings.model_fields},
    )


def _section(title: str, fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    if fields:
        yield _title(title)
    for name, field in fields.items():
        yield _setting(name, field)


def _title(text: str) -> str:
    return f"# --- {text} ".ljust(WIDTH, "-") + "\n"


def _setting(name: str, field: FieldInfo) -> str:
    words = field.description or ""
    names = [alias.upper() for alias, target in ALIASES.items() if target == name]
    if names:
        words += f" Alias{'es' if len(names) > 1 else ''}: {', '.join(names)}."
    comment = textwrap.wrap(words, WIDTH - 2, break_on_hyphens=False)
    lines = [*comment, f"{name.upper()}={spelled(field.default)}"]
    return "".join(f"# {line}\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write .env.example.")
    parser.add_argument("--check", action="store_true", help="fail where the file differs, and write nothing")
    if not parser.parse_args().check:
        PATH.write_text(text(), "utf-8")
    elif PATH.read_text("utf-8") != text():
        print(f"{PATH} differs from the settings: run `make env-example`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
