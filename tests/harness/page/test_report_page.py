"""The report as a file: words first, nothing fetched, every chart drawn, also as Markdown and PNG."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.comparing.combine import read_result
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.page.files import load_report, write_charts
from harness.page.html import make_charts, render_page
from harness.page.summary import verdict_sentences
from harness.results.cost import Price, read_price
from harness.results.manifest import GitFacts, HostFacts, Validity
from harness.results.record import make_table, write_parquet
from harness.results.slo import Slo
from harness.results.steps import step_rows, write_steps
from services.contract.status import StepLine
from tests.harness.comparing.test_comparison import comparison, run_rows
from tests.harness.results.test_latency_budget import told
from tools.cli import main

HOST = HostFacts(cpu_model="a <CPU>", cpu_governor=None, physical_cores=2, memory_bytes=2**34)


HOSTILE = """<script>alert('1' & "2")</script>/x"""


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return write_comparison(tmp_path, "baseline", "static", "continuous")


def write_comparison(folder: Path, *arms: str, prompt: str = "p") -> Path:
    """Three blocks, each arm twice as fast as the one before it; the first two arms have a step log."""
    runs = [
        run_rows(arm, block, 0.5**place * (1 + 0.01 * block))
        for block in range(3)
        for place, arm in enumerate(arms)
    ]
    rows, manifest = comparison(*runs, reference=arms[0])
    stamps = told()
    for number, run in enumerate(manifest.runs):
        run.run_id, run.host, run.git = f"run-{number}", HOST, GitFacts(sha="a" * 40)
        run.validity = Validity()
        for index, row in enumerate(runs[number]):
            row |= {"run_id": f"run-{number}", "prompt_id": f"{prompt}{index}"}
            for name in ("queue_s", "batch_wait_s", "prefill_s", "decode_s"):
                row[name] = 0.01
            for name in ("written_s", "received_s", "first_token_s", "first_write_s"):
                row[name] = row["sent_s"] + stamps[name] - 10.3
    path = folder / "comparison.parquet"
    line = StepLine(
        step=0, start_s=0.0, duration_s=9.0, num_rows=1, num_prompt_tokens=1, num_decode_tokens=0,
        num_dead_rows=0, queue_depth=0,
    )  # fmt: skip
    for run in manifest.runs[:2]:
        run.path = str(folder / f"{run.run_id}.parquet")
        write_steps(folder / f"{run.run_id}.steps.parquet", step_rows([line], run.run_id, 0), run)
    write_parquet(path, make_table(rows), manifest)
    return path


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_but_itself(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(result)]) == 0
    page = result.with_suffix(".html").read_text(encoding="utf-8")
    assert f"report: {result.with_suffix('.html')}" in capsys.readouterr().out
    tags = Tags()
    tags.feed(page)
    for tag, attributes in tags.found:
        assert tag not in ("img", "iframe", "object")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "@import" not in page
    assert "url(http" not in page
    assert "a &lt;CPU&gt;" in page
    assert len(page) < 3_000_000
    words = re.sub(r"<[^>]+>", " ", page)
    assert words.index("continuous wins: 2.00x") < words.index("Throughput and latency")


def test_what_comes_from_outside_is_shown_and_never_run(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, HOSTILE, "static", prompt=HOSTILE)
    data = load_report([read_result(path)], slo=Slo(), price=Price(), reference=None, margin=DEFAULT_MARGIN)
    data.manifest.validity = Validity(caution=(f"all arms: {HOSTILE}",))
    page = render_page(data, HOSTILE)
    tags = Tags()
    tags.feed(page)
    assert [tag for tag, _ in tags.found].count("script") == 2  # the manifest's and the table's own
    assert "alert('1'" not in page
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    items = [item for drawn in make_charts(data).values() for item in ElementTree.fromstring(drawn).iter()]
    words = [item.text for item in items if item.text]
    assert HOSTILE in words
    assert any(text.startswith(f"{HOSTILE}0: prompt") for text in words)
    assert len(write_charts(data, tmp_path / "charts")) == len(make_charts(data))
    manifest = re.search(r'id="manifest">(.*?)</script>', page)
    assert manifest is not None
    assert json.loads(manifest[1])[0]["arm"] == HOSTILE


def test_the_answer_names_winner_size_and_certainty(result: Path) -> None:
    data = load_report([read_result(result)], slo=Slo(), price=Price(), reference=None, margin=DEFAULT_MARGIN)
    sentences = verdict_sentences(data)
    assert sentences[0].startswith("continuous wins: 2.00x [2-2] the output tok/s of the next, static.")
    assert sentences[1].startswith("Against baseline: 4.00x the tokens, the whole answer 4.00x sooner, TTFT")
    assert "over 3 blocks" in sentences[2]
    assert any("Where the first token waited longest" in sentence for sentence in sentences)


def test_every_chart_is_well_formed(result: Path) -> None:
    data = load_report([read_result(result)], slo=Slo(), price=Price(), reference=None, margin=DEFAULT_MARGIN)
    charts = make_charts(data)
    curves = {"throughput-latency", "ttft-cdf", "itl-cdf", "total-cdf"}
    assert set(charts) == {*curves, "budget", "timeline-baseline", "timeline-static"}
    for drawn in charts.values():
        root = ElementTree.fromstring(drawn)
        assert not any("nan" in str(value) for item in root.iter() for value in item.attrib.values())


def test_cost_follows_from_the_price(result: Path) -> None:
    data = load_report(
        [read_result(result)], slo=Slo(), price=Price(per_hour_usd=3.6), reference=None, margin=0.05
    )
    # 2 tokens/s at 0.001 USD a second: 500 USD per million.
    (baseline,) = [arm for arm in data.arms if arm.name == "baseline"]
    assert baseline.usd_per_million_tokens == pytest.approx(3.6 / (baseline.middle_tokens_per_s * 3600) * 1e6)
    assert "USD per million output tokens" in render_page(data, "t")
    assert read_price(None, 2e-6).per_million_tokens(123.0) == pytest.approx(2.0)


def test_markdown_and_png(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(result), "--markdown", "--png", str(tmp_path / "charts")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("### baseline, static, continuous on m")
    assert "| continuous |" in shown
    assert not result.with_suffix(".html").exists()
    charts = sorted(tmp_path.glob("charts/*.png"))
    assert len(charts) == 7
    assert all(chart.read_bytes().startswith(b"\x89PNG") for chart in charts)
