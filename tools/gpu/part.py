"""`python -m tools.gpu.part SPEC ROWS`: one part of `gpu_bench`, in this process.

SPEC is a JSON file with what the parent knows. Every result is a JSON line of ROWS as soon as it is there, so
that a process which is killed loses only what it had not measured.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from tools.gpu.plan import Part, Sizes

FAILED = "FAILED"
"""How a note of a failure begins."""
LOADED = "loaded"
"""The table of the backends that were loaded."""


@dataclass
class PartRun:
    """What a part is told, and where its results go."""

    kind: str
    """The part's name, which its load is listed under."""
    model: str
    real_weights: bool
    options: dict[str, Any]
    device: str
    dtype: str
    sizes: Sizes
    seed: int
    limit_s: float
    artifacts_dir: str
    facts: dict[str, Any]
    """What earlier parts found out of the machine."""
    earlier: list[dict[str, Any]]
    """The rows of earlier parts."""
    lines: Path
    started_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.started_s)

    def add(self, table: str, name: str, **figures: Any) -> None:
        self._write("row", {"table": table, "model": self.model, "name": name, **figures})

    def add_facts(self, **facts: Any) -> None:
        self.facts |= facts
        self._write("facts", facts)

    def begin_loading(self) -> None:
        """Whoever ends between this and a row of `LOADED` could not load."""
        self._write("loading", True)

    def note(self, text: str) -> None:
        self._write("note", f"{self.model}: {text}")

    def say(self, text: str) -> None:
        print(f"    {text}", flush=True)

    def fits(self, what: str, needs_s: float) -> bool:
        """False, and noted, where `what` takes longer than is left."""
        if needs_s <= self.left_s:
            return True
        self.note(f"skipped: {what} (about {needs_s:.0f} s, {max(self.left_s, 0):.0f} s left)")
        return False

    def run(self, what: str, measure: Callable[[], None], needs_s: float = 1.0) -> None:
        """One measurement among several; its failure is noted and ends no other."""
        if not self.fits(what, needs_s):
            return
        self.say(f"{what} ... ({self.left_s:.0f} s left)")
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            self.note(f"{FAILED}: {what}: {type(error).__name__}: {str(error)[:300]}")

    def known(self, figure: str, table: str, **wanted: Any) -> Any:
        """The figure of an earlier row with these values; None where there is none."""
        wanted |= {"table": table, "model": self.model}
        for row in self.earlier:
            if all(row.get(key) == value for key, value in wanted.items()):
                return row.get(figure)
        return None

    def _write(self, kind: str, content: Any) -> None:
        if kind == "row":
            self.earlier.append(content)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: content}, default=str) + "\n")


class _Warnings(logging.Handler):
    """What the backend warns of decides how its figures are to be read."""

    def __init__(self, part: PartRun) -> None:
        super().__init__(logging.WARNING)
        self._part = part

    def emit(self, record: logging.LogRecord) -> None:
        self._part.note(record.getMessage()[:400])


def read_spec(spec: dict[str, Any], lines: Path) -> PartRun:
    sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.pop("sizes").items()}
    return PartRun(sizes=Sizes(**sizes), lines=lines, **spec)


def main() -> int:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    module, _, name = spec.pop("function").partition(":")
    part = read_spec(spec, Path(sys.argv[2]))
    # Says where a part hangs, just before the parent ends it.
    faulthandler.dump_traceback_later(max(1.0, part.limit_s - 2))
    logging.getLogger("adapters").addHandler(_Warnings(part))
    try:
        getattr(import_module(module), name)(part)
    except Exception as error:
        traceback.print_exc()
        part.note(f"{FAILED}: {type(error).__name__}: {str(error)[:300]}")
        return 1
    return 0


def spec_of(part: Part) -> dict[str, Any]:
    """What a process must know of its part; the rest of `PartRun` is the same for all."""
    names = ("function", "model", "real_weights")
    return {"kind": part.name, **{name: getattr(part, name) for name in names}}


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of foreign libraries may still compute
