"""What is made of a history: the page, the pictures, the series."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from harness.history import page, store
from harness.history.exposition import NAMES, to_openmetrics
from harness.history.series import SHOWN
from harness.history.store import History
from tests.harness.history.made_history import held, made_night, made_nights
from tools.cli import main


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    store.add(folder / "h", made_nights(folder / "r", 24, step_at=14))
    store.add(folder / "h", [made_night(folder / "r", 3, 0.01, arm="<b>odd</script>")])
    return folder / "h"


def specs_of(page: str) -> dict[str, dict[str, object]]:
    found = re.search(r"const SPECS = (\{.*\});", page)
    assert found
    made: dict[str, dict[str, object]] = json.loads(found[1])
    return made


def test_the_page_is_whole_and_fetches_nothing(
    history: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, pictures = tmp_path / "index.html", tmp_path / "png"
    words = ["history", "page", "--folder", str(history), "--html", str(page), "--png", str(pictures)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "output tok/s of continuous (null, m, closed 1 x8) -" in told
    text = page.read_text()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["'](?!data:)""", own)
    assert "output tok/s of continuous" in " ".join(own.split())
    assert "prefers-color-scheme: dark" in own
    specs = specs_of(text)
    assert {name.split("-", 1)[1] for name in specs} <= set(SHOWN)
    marks = [layer["mark"]["type"] for layer in specs["0-output_tokens_per_s"]["layer"]]
    assert marks == ["area", "line", "point", "rule", "text"]
    assert len(list(pictures.glob("*.png"))) == len(specs)


def test_names_from_files_cannot_leave_their_place(history: Path, tmp_path: Path) -> None:
    main(["history", "page", "--folder", str(history), "--html", str(tmp_path / "p.html")])
    text = (tmp_path / "p.html").read_text()
    assert "<b>odd" not in text
    assert "odd</script>" not in text


def test_series_have_the_names_of_the_dashboards(history: Path, tmp_path: Path) -> None:
    path = tmp_path / "history.om"
    assert main(["history", "openmetrics", "--folder", str(history), "--file", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert lines[-1] == "# EOF"
    told = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    expected = {name + end for name, _ in NAMES.values() for end in ("", "_low", "_high")}
    expected |= {
        f"lab_{kind}_ratio{end}" for kind in ("comparison", "chained") for end in ("", "_low", "_high")
    }
    expected.add("lab_result_valid")
    assert told == expected
    samples = [
        sample
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
        if sample.name == "lab_result_ttft_p50_seconds" and sample.labels["commit"] == "000000000000"
    ]
    labels = {"backend": "null", "model": "m", "load": "closed 1 x8", "commit": "000000000000"}
    labels["machine"] = store.read(history).rows["machine"].iloc[0]
    (sample,) = (s for s in samples if s.labels == labels | {"strategy": "continuous"})
    assert 0.01 < sample.value < 0.1
    assert float(sample.timestamp) == 1788228000.0
    # Every family stands in one piece.
    families = [line.partition("{")[0] for line in lines if not line.startswith("#")]
    changes = sum(a != b for a, b in pairwise(families))
    assert changes == len(set(families)) - 1


def test_invalid_results_are_no_values() -> None:
    rows = pd.DataFrame(
        line
        for night, validity in enumerate(("VALID", "INVALID"))
        for line in (
            held(night, "a" * 12, "b" * 12, 0.4, validity=validity),
            held(night, "", "b" * 12, 5.0, kind="result", against=None, validity=validity),
        )
    )
    samples = [
        sample for family in text_string_to_metric_families(to_openmetrics(rows)) for sample in family.samples
    ]
    num = Counter(sample.name for sample in samples)
    assert num["lab_result_throughput_tokens_per_s"] == num["lab_comparison_ratio_high"] == 1
    assert [s.value for s in samples if s.name == "lab_result_valid"] == [1.0, 0.0]
    drawn = page.make_parts(History(rows, ()))[0].trends[-1].spec["layer"]
    filters = {layer["mark"]["type"]: layer.get("transform") for layer in drawn}
    assert filters["line"] == filters["area"] == [{"filter": "datum.validity != 'INVALID'"}]
    assert filters["point"] is None


def test_a_missing_name_is_an_empty_label() -> None:
    rows = pd.DataFrame(
        held(night, "a", "b", 1.0, model=model) for night, model in enumerate((None, "m", float("nan")))
    )
    assert 'model=""' in to_openmetrics(rows)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_prometheus_takes_the_series(history: Path, tmp_path: Path) -> None:
    path = tmp_path / "history.om"
    main(["history", "openmetrics", "--folder", str(history), "--file", str(path)])
    words = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(path), str(tmp_path / "blocks")]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert len(list((tmp_path / "blocks").iterdir())) >= 24


def test_years_of_nights_are_drawn(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.read(history)
    one = kept.rows[kept.rows["metric"] == SHOWN[0]]
    many = pd.concat([one] * (5001 // len(one) + 1), ignore_index=True)
    monkeypatch.setattr(page, "marks", lambda rows: [])
    monkeypatch.setattr(page, "chained", lambda rows: rows.iloc[:0])
    assert page.make_parts(replace(kept, rows=many))
