"""Writes `.env.example` from the settings of the service, its backends and the harness.

With --check it writes nothing and fails where the file is another; `make check` runs it so.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapters.registry import BACKENDS
from harness.results.output_dir import whole_file
from harness.settings import HarnessSettings, ReportSettings, spelled
from services.engine.policies import Policies
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
SECTIONS = {
    "variant": "What is served",
    "max_batch": "Batching",
    "max_tokens": "What a request gets that does not say",
    "host": "The service",
}
"""By the first setting of each section."""


def text() -> str:
    """The whole file."""
    sections: dict[str, list[str]] = {}
    for name in Settings.model_fields:
        title = SECTIONS.get(name) or list(sections)[-1]
        sections.setdefault(title, []).append(name)
    sections["Policies beside the strategy"] = list(option_fields(Policies))
    sections["Of single strategies"] = list(option_fields(StrategyConfig))
    sections |= {f"BACKEND={name}": list(option_fields(told.options)) for name, told in BACKENDS.items()}
    of_harness = (*HarnessSettings.model_fields, *ReportSettings.model_fields)
    title = "The harness: what `lab bench`, `lab compare` and reports read"
    sections[title] = [name for name in of_harness if name not in Settings.model_fields]
    return "\n".join([HEAD, *_lines(sections.items())])


def _lines(sections: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    fields = ReportSettings.model_fields | HarnessSettings.model_fields | all_settings().model_fields
    for title, names in sections:
        if names:
            yield f"# --- {title} ".ljust(WIDTH, "-") + "\n"
        for name in names:
            words = fields[name].description or ""
            aliases = [alias.upper() for alias, target in ALIASES.items() if target == name]
            if aliases:
                words += f" Alias{'es' if len(aliases) > 1 else ''}: {', '.join(aliases)}."
            comment = textwrap.wrap(words, WIDTH - 2, break_on_hyphens=False)
            lines = [*comment, f"{name.upper()}={spelled(fields[name].default)}"]
            yield "".join(f"# {line}\n" for line in lines)


def main() -> int:
    if "--check" not in sys.argv:
        with whole_file(PATH) as file:
            file.write(text().encode())
    elif PATH.read_text("utf-8") != text():
        print(f"{PATH} differs from the settings: run `make env-example`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
