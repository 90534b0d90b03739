"""Runs the parts of `gpu_bench`, each in a process of its own, and writes what they bring.

A part that fails, hangs or crashes costs only itself. Imports no torch: the parent must hold no memory of the
device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tools.gpu.part import FAILED, LOADED, spec_of
from tools.gpu.plan import Part, Sizes
from tools.gpu.tables import render
from tools.result_file import write_rows

_WAYS_OUT: tuple[dict[str, Any], ...] = (
    {"triton_kernels": False},
    {"cuda_graphs": False},
    {"cuda_graphs": False, "triton_kernels": False},
)
"""Options that are tried in turn once a backend could not be loaded as it should be."""
_LAST_LINES = 8
_ENDED = "was ended after"
_KILL_S = 10.0


@dataclass
class Bench:
    """All results so far, and the time that is left."""

    folder: Path
    """Gets `rows.parquet`, `tables.md` and `log.txt`, which are written anew after every part."""
    device: str
    dtype: str
    sizes: Sizes
    seed: int
    budget_s: float
    artifacts_dir: str
    patience: float
    """Times the limits of parts, which are meant for a GPU: a busy CPU may take longer even for little."""
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    way_out: dict[str, Any] = field(default_factory=dict)
    """Options of all parts, since without them a backend could not be loaded."""
    _given_up: set[str] = field(default_factory=set)
    """Models that could be loaded with none of the options."""

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.started_s)

    @property
    def has_failed(self) -> bool:
        return not self.rows or any(FAILED in note for note in self.notes)

    def run(self, part: Part) -> None:
        """Run one part and print what it brought."""
        if part.needs_s > self.left_s:
            left_s = max(self.left_s, 0)
            self.notes.append(f"skipped: {part.title} (about {part.needs_s:.0f} s, {left_s:.0f} s left)")
            self._write()
            return
        num_rows, num_notes = len(self.rows), len(self.notes)
        if not self._try(part, self.way_out) and part.model not in self._given_up:
            self._try_with_less(part)
        self._write()
        print(f"\n{render(self.rows[num_rows:])}", flush=True)
        for note in self.notes[num_notes:]:
            print(f"- {note}", flush=True)

    def _try_with_less(self, part: Part) -> None:
        """The first of the options with which it loads is kept for the parts that follow.

        Where it loads with none of them, they are not to blame: the parts that follow keep what they had.
        """
        for options in _WAYS_OUT:
            if options.items() <= (part.options | self.way_out).items():
                continue
            if self.left_s <= part.needs_s:
                return
            self.notes.append(f"{part.title}: tried again with {options}")
            if self._try(part, options):
                self.way_out = options
                self.notes.append(f"the parts that follow are run with {options}")
                return
        self._given_up.add(part.model)

    def _try(self, part: Part, way_out: dict[str, Any]) -> bool:
        """One process; False where it ended by itself before its backend was loaded."""
        limit_s = min(self.patience * part.limit_s, self.left_s)
        print(f"\n{part.title} ({limit_s:.0f} s at most, {self.left_s:.0f} s left)", flush=True)
        facts = {
            "options": part.options | way_out,
            "device": self.device,
            "dtype": self.dtype,
            "sizes": dataclasses.asdict(self.sizes),
            "seed": self.seed,
            "limit_s": limit_s,
            "artifacts_dir": self.artifacts_dir,
            "facts": self.facts,
            "earlier": self.rows,
        }
        log = self.folder / "log.txt"
        begins = log.stat().st_size if log.exists() else 0
        with tempfile.TemporaryDirectory() as parent:
            spec, lines = Path(parent) / "spec.json", Path(parent) / "rows.jsonl"
            spec.write_text(json.dumps(spec_of(part) | facts, default=str), encoding="utf-8")
            command = [sys.executable, "-m", "tools.gpu.part", str(spec), str(lines)]
            problem = _run(command, log, limit_s)
            is_loading = self._read(lines)
        if problem:
            said = log.read_bytes()[begins:].decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
            lasts = "".join(f"\n      {line[:200]}" for line in said)
            self.notes.append(f"{FAILED}: {part.title} {problem}; its last lines:{lasts}")
        return not (problem and is_loading and _ENDED not in problem)

    def _read(self, lines: Path) -> bool:
        """Take what the process has written, a last line that was cut off excepted; True while it loads."""
        is_loading = False
        for text in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                break
            is_loading = is_loading or "loading" in line
            if "row" in line:
                self.rows.append(line["row"])
                is_loading = is_loading and line["row"]["table"] != LOADED
            self.facts |= line.get("facts", {})
            self.notes += [line["note"]] if "note" in line else []
        return is_loading

    def _write(self) -> None:
        write_rows(pd.DataFrame(self.rows), self.folder / "rows.parquet", {**self.facts, "notes": self.notes})
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        notes = "\n".join(f"- {note}" for note in self.notes)
        text = f"# gpu-bench\n\n{facts}\n\n{render(self.rows)}\n\n## Notes\n\n{notes}\n"
        (self.folder / "tables.md").write_text(text, encoding="utf-8")


def _run(command: list[str], log: Path, limit_s: float) -> str | None:
    """Run it for at most `limit_s`; returns what went wrong, if anything did."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    started_s = time.monotonic()
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=2, stderr=errors, env=environment)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"{_ENDED} {limit_s:.0f} s"
        finally:
            process.kill()
            # One that waits within the driver cannot be killed: the others go on without it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)
    print(f"    took {time.monotonic() - started_s:.0f} s", flush=True)
    return f"ended with {code}" if code else None
