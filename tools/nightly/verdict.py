"""What a measured pair of commits says, as `verdict.json` and as Markdown.

The comment on a pull request is made of this file by a workflow that may write, while the file comes from
code that nobody has read yet. So every field has a pattern or a bound, and nothing else of the file is used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from adapters.base import LabError
from harness.results.output_dir import whole_file

Word = Literal["pass", "REGRESSION", "can't tell", "FAILED"]
WORDS: tuple[Word, ...] = ("pass", "can't tell", "FAILED", "REGRESSION")
"""The worst last: a run is as bad as its worst pair."""
EXIT_STATUS: dict[Word, int] = {"pass": 0, "REGRESSION": 1, "FAILED": 2, "can't tell": 3}

BackendName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}$")]
ArmName = Annotated[
    str,
    Field(
        pattern=r"^[a-z][a-z0-9_-]*(@[A-Z_]+=[A-Za-z0-9._:/-]+(,[A-Z_]+=[A-Za-z0-9._:/-]+)*)?$", max_length=80
    ),
]
"""A strategy, and what the arm sets for itself: `continuous@MODEL=smollm2-135m:q4_1`."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9 /]{1,40}$")]
Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]
Ratio = Annotated[float, Field(gt=0, lt=1e6)]
BAR_CHARS = 31
BAR_REACH = 0.25
"""A bar shows ratios from 1 - this to 1 + this."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(_Strict):
    """One figure of the new commit, as a ratio to the old one."""

    label: Label
    ratio: Ratio
    low: Ratio | None
    high: Ratio | None
    higher_is_better: bool


class Pair(_Strict):
    backend: BackendName
    variant: ArmName
    word: Word | Literal["new"]
    """`new`: the old commit has no such strategy or backend."""
    num_blocks: int = Field(ge=0, le=1000)
    lines: tuple[Line, ...] = Field(max_length=20)


class Verdict(_Strict):
    old: Sha
    new: Sha
    limit: float = Field(gt=0, lt=1)
    took_s: float = Field(ge=0, lt=1e6)
    pairs: tuple[Pair, ...] = Field(max_length=60)

    @property
    def word(self) -> Word:
        words: list[Word] = ["pass" if pair.word == "new" else pair.word for pair in self.pairs]
        return max(words, key=WORDS.index, default="FAILED")


def arm_name(text: str) -> str:
    return TypeAdapter(ArmName).validate_python(text)


def backend_name(text: str) -> str:
    return TypeAdapter(BackendName).validate_python(text)


def read_verdict(path: Path) -> Verdict:
    """
    Raises:
        LabError: it is not there, or holds anything that a verdict does not.
    """
    try:
        return Verdict.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise LabError(f"{path} is no verdict: {str(error).splitlines()[0]}") from error


def write_verdict(verdict: Verdict, path: Path) -> None:
    with whole_file(path) as file:
        file.write(verdict.model_dump_json(indent=1).encode())


HEADLINES: dict[Word, str] = {
    "pass": "No regression",
    "REGRESSION": "A regression",
    "can't tell": "Can't tell: the time ran out before there was a verdict",
    "FAILED": "A measurement failed",
}


def headline(verdict: Verdict) -> str:
    return f"{HEADLINES[verdict.word]}: {verdict.new[:12]} against {verdict.old[:12]}"


def to_markdown(verdict: Verdict, link: str = "") -> str:
    """For a step summary, an issue or a comment."""
    parts = [f"### {headline(verdict)}"]
    parts.append(
        f"Both commits measured in turns on one machine for {verdict.took_s / 60:.0f} min. "
        f"Ratios are new / old; worse by more than {verdict.limit:.0%} is a regression. "
        "Latencies count from the schedule."
    )
    lines = ["| backend | strategy | verdict | blocks |", "|---|---|---|---:|"]
    lines += [f"| `{p.backend}` | `{p.variant}` | {p.word} | {p.num_blocks} |" for p in verdict.pairs]
    parts.append("\n".join(lines))
    parts.append(f"```text\n{_bars(verdict)}\n```")
    return "\n\n".join([*parts, *filter(None, [link])])


def _bars(verdict: Verdict) -> str:
    """The intervals as lines of text: they need no picture that somebody would have to host."""
    edge = (
        f"{1 - BAR_REACH:g}x".ljust(BAR_CHARS // 2) + "1x" + f"{1 + BAR_REACH:g}x".rjust(BAR_CHARS // 2 - 1)
    )
    lines = [" " * 44 + edge]
    for pair in verdict.pairs:
        for line in pair.lines:
            name = f"{pair.backend} {pair.variant}"[:26].ljust(27) + line.label[:15].ljust(16)
            interval = f" [{line.low:.3g}-{line.high:.3g}]" if line.low and line.high else ""
            lines.append(f"{name} {_bar(line)} {line.ratio:.3f}x{interval}")
    return "\n".join(lines)


def _bar(line: Line) -> str:
    def place(ratio: float) -> int:
        inside = min(max((ratio - 1) / BAR_REACH, -1.0), 1.0)
        return math.floor((inside + 1) / 2 * (BAR_CHARS - 1) + 0.5)

    cells = [" "] * BAR_CHARS
    cells[BAR_CHARS // 2] = "|"
    low, high = place(line.low or line.ratio), place(line.high or line.ratio)
    cells[low : high + 1] = ["-"] * (high - low + 1)
    cells[place(line.ratio)] = "o"
    return "".join(cells)
