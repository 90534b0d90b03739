"""Rows of `gpu_bench` as Markdown tables, one for each kind of row."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.results.table import MISSING, render_table


def render(rows: list[dict[str, Any]]) -> str:
    """Columns that are empty throughout a table are left out."""
    if not rows:
        return "(no rows)"
    tables = []
    for table, part in pd.DataFrame(rows).groupby("table", sort=False):
        frame = part.drop(columns="table").dropna(axis=1, how="all")
        cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
        tables.append(f"### {table}\n\n{render_table([str(name) for name in frame.columns], cells)}")
    return "\n\n".join(tables)


def _cell(value: Any) -> str:
    if value is None or value != value:
        return MISSING
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.3f}"
    return str(value)
