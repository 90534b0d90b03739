"""The dashboard *Results* over the results that the documentation holds, as a person first sees it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.history import store
from harness.history.exposition import NAMES
from tests.ops.servers import prometheus
from tests.ops.test_panels import DAY_S, REAL_NIGHTS, filled, resolved, write_results
from tools.dashboards.results import FIGURES, RESULTS

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]


def test_results_open_with_an_answer_in_every_panel(tmp_path: Path) -> None:
    """The project's own results: nights of one load, and comparisons of strategies under others."""
    shutil.copytree(REAL_NIGHTS, tmp_path / "history")
    measured = [p for name in ("compare", "natural") for p in REAL_NIGHTS.parent.glob(f"{name}*.parquet")]
    store.add(tmp_path / "history", measured)
    rows = store.read(tmp_path / "history").rows
    assert rows["backend"].nunique() > 1
    write_results(tmp_path, rows)
    at_s = rows["started_at"].max().timestamp() + DAY_S
    with prometheus(tmp_path, {}) as scraping:
        chosen = resolved(scraping, RESULTS, at_s) | {"$__interval": "6h", "$__range": "90d"}
        empty = [
            panel["title"]
            for panel in RESULTS["panels"]
            if panel["type"] != "row"
            and not any(
                scraping.values(filled(t["expr"], chosen), since_s=90 * DAY_S, step_s=6 * 3600, at_s=at_s)
                for t in panel["targets"]
            )
        ]
    opened = rows.query(
        "backend == @chosen['$backend'] and model == @chosen['$model'] and load == @chosen['$load']"
    )
    lacking = {name for metric, (name, _) in NAMES.items() if metric not in set(opened["metric"])}
    assert lacking <= {"lab_result_itl_p99_seconds"}  # 32 requests have no p99
    assert empty == [title for name, (title, *_) in FIGURES.items() if f"lab_result_{name}" in lacking], (
        chosen
    )
