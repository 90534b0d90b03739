"""Runs the parts of `gpu_bench` one after the other, each in a process of its own, and writes what they bring.

A part that fails, hangs or crashes costs only itself. Imports no torch: the parent must hold no memory of the
device.
"""

from __future__ import annotations

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

from tools.gpu.part import spec_of
from tools.gpu.plan import Part, Sizes
from tools.gpu.tables import render
from tools.result_file import write_rows

_WAYS_OUT: tuple[dict[str, Any], ...] = (
    {"cuda_graphs": False},
    {"cuda_graphs": False, "triton_kernels": False},
)
"""Options that a part is tried with once it could not be loaded as it should be."""
_LAST_LINES = 8


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
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    way_out: dict[str, Any] = field(default_factory=dict)
    """Options without which nothing could be loaded, kept for the parts that follow."""

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.started_s)

    def run(self, part: Part) -> None:
        """Run one part and print what it brought."""
        if part.needs_s > self.left_s:
            self._note(f"skipped: {part.title} (about {part.needs_s:.0f} s, {max(self.left_s, 0):.0f} s left)")
            self._write()
            return
        num_rows, num_notes = len(self.rows), len(self.notes)
        has_failed = self._try(part, self.way_out)
        for options in _WAYS_OUT:
            # Whoever has loaded and then failed would fail again.
            if not has_failed or len(self.rows) > num_rows or self.left_s < part.needs_s:
                break
            if options.items() <= self.way_out.items():
                continue
            self._note(f"{part.title}: tried again with {options}")
            has_failed = self._try(part, options)
            if not has_failed:
                self.way_out = options
        self._write()
        print(f"\n{render(self.rows[num_rows:])}", flush=True)
        for note in self.notes[num_notes:]:
            print(f"- {note}", flush=True)

    def _try(self, part: Part, way_out: dict[str, Any]) -> bool:
        """One process; True where it could not be started, ended with an error, or was ended."""
        limit_s = min(part.limit_s, self.left_s)
        with tempfile.TemporaryDirectory() as parent:
            spec, lines = Path(parent) / "spec.json", Path(parent) / "rows.jsonl"
            facts = {
                "device": self.device,
                "dtype": self.dtype,
                "sizes": self.sizes,
                "seed": self.seed,
                "limit_s": limit_s,
                "artifacts_dir": self.artifacts_dir,
                "facts": self.facts,
                "earlier": self.rows,
            }
            content = spec_of(part, **facts)
            content["options"] = {**part.options, **way_out}
            spec.write_text(json.dumps(content, default=str), encoding="utf-8")
            print(f"\n{part.title} ({limit_s:.0f} s at most, {self.left_s:.0f} s left)", flush=True)
            log = self.folder / "log.txt"
            begins = log.stat().st_size if log.exists() else 0
            problem = self._process([sys.executable, "-m", "tools.gpu.part", str(spec), str(lines)], log, limit_s)
            self._read(lines)
        if problem:
            said = log.read_bytes()[begins:].decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
            self._note(f"{part.title} {problem}; its last lines:" + "".join(f"\n      {line[:200]}" for line in said))
        return problem is not None

    @staticmethod
    def _process(command: list[str], log: Path, limit_s: float) -> str | None:
        """Returns what went wrong, if anything did."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
        started_s = time.monotonic()
        with log.open("ab") as errors:
            process = subprocess.Popen(command, stdout=2, stderr=errors, env=environment)
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return f"was ended after {limit_s:.0f} s"
            finally:
                process.kill()
                process.wait()
        print(f"    took {time.monotonic() - started_s:.0f} s", flush=True)
        return f"ended with {code}" if code else None

    def _read(self, lines: Path) -> None:
        """What the process has written, a last line that was cut off excepted."""
        for text in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if "row" in line:
                self.rows.append(line["row"])
            self.facts |= line.get("facts", {})
            self.notes += [line["note"]] if "note" in line else []

    def _note(self, text: str) -> None:
        self.notes.append(text)

    def _write(self) -> None:
        write_rows(pd.DataFrame(self.rows), self.folder / "rows.parquet", {**self.facts, "notes": self.notes})
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        notes = "\n".join(f"- {note}" for note in self.notes)
        text = f"# gpu-bench\n\n{facts}\n\n{render(self.rows)}\n\n## Notes\n\n{notes}\n"
        (self.folder / "tables.md").write_text(text, encoding="utf-8")
