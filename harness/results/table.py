"""Tables that read well in a terminal and are valid Markdown: the first column left, the others right.

Cells may hold what came from outside (names of models and arms, error texts), so all of them are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from adapters.text.unicode_text import printable

MISSING = "-"
_MARKUP = re.compile(r"[\\`*\[\]<>]")


def render_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Every row has as many cells as there are headers."""
    headers, rows = _escaped(headers), [_escaped(row) for row in rows]
    widths = [max(3, *(len(line[column]) for line in (headers, *rows))) for column in range(len(headers))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_line(cells, widths) for cells in (headers, rule, *rows))


def counted(num: int, noun: str) -> str:
    """As `1 block` and `3 blocks`."""
    return f"{num} {noun}{'s' * (num != 1)}"


def duration_text(seconds: float) -> str:
    """As `50 s`, `12 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def replace_section(path: Path, name: str, table: str) -> None:
    """Put `table` between `<!-- NAME -->` and `<!-- /NAME -->` of a Markdown file.

    Raises:
        ValueError: the file has no such marks.
    """
    text, mark = path.read_text(encoding="utf-8"), re.escape(name)
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    made, num = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
    if num != 1:
        raise ValueError(f"{path} has no one place for {name}")
    path.write_text(made, encoding="utf-8")


def markdown_text(text: str) -> str:
    """Words that may hold names from outside, as one line of Markdown: no link, picture or tag of theirs."""
    return _MARKUP.sub(lambda match: "\\" + match[0], printable(text))


def number(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None or value != value else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, and the extremes where there are several."""
    if not values:
        return MISSING
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    if len(ordered) == 1:
        return number(median, digits)
    return f"{number(median, digits)} [{number(ordered[0], digits)}-{number(ordered[-1], digits)}]"


def _escaped(cells: Sequence[str]) -> list[str]:
    return [printable(cell).replace("|", "\\|") for cell in cells]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
    return f"| {' | '.join(padded)} |"
