"""The report as a file: words first, nothing fetched, every chart drawn; also Markdown, JSON and pictures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import vl_convert
from markupsafe import escape

from harness.comparing.combine import read_result
from harness.comparing.verdict import DEFAULT_MARGIN
from harness.page import explanations
from harness.page.charts import make_charts
from harness.page.data import ReportData, load_report
from harness.page.files import render_page, told_once, write_charts
from harness.page.picture import ARM_COLOURS, description, theme
from harness.page.summary import (
    answer_sentences,
    as_json,
    command,
    figure_table,
    question,
    verdict_sentences,
)
from harness.results.cost import Price, read_price
from harness.results.manifest import GitFacts, HostFacts, Validity
from harness.results.metrics import METRICS, compared_figures
from harness.results.record import make_table, write_parquet
from harness.results.slo import Slo
from harness.results.steps import step_rows, write_steps
from harness.results.table import markdown_text
from services.contract.status import StepLine
from tests.harness.comparing.test_comparison import comparison, run_rows
from tests.harness.results.test_latency_budget import told
from tools.cli import main

HOST = HostFacts(cpu_model="a <CPU>", cpu_governor=None, physical_cores=2, memory_bytes=2**34)


HOSTILE = """<script>alert('1' & "2")</script>/x"""


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return write_comparison(tmp_path, "baseline", "static", "continuous")


def write_comparison(
    folder: Path, *arms: str, prompt: str = "p", num_blocks: int = 3, factor: float = 0.5
) -> Path:
    """Each arm takes `factor` of the time of the one before it; the first two arms have a step log."""
    runs = [
        run_rows(arm, block, factor**place * (1 + 0.01 * block))
        for block in range(num_blocks)
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
        num_dead_rows=1, queue_depth=0,
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
    assert words.index("continuous wins: 2.00x") < words.index("Everything")
    assert "3 blocks" in words
    assert words.index("VALID") < words.index("Everything")


def test_what_comes_from_outside_is_shown_and_never_run(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, HOSTILE, "static", prompt=HOSTILE)
    data = load_report([read_result(path)], slo=Slo(), price=Price(), reference=None, margin=DEFAULT_MARGIN)
    data.manifest.validity = Validity(caution=(f"all arms: {HOSTILE}",))
    page = render_page(data)
    tags = Tags()
    tags.feed(page)
    assert [tag for tag, _ in tags.found].count("script") == 5  # three of data, the library, the page's own
    assert "alert('1'" not in page
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    charts = embedded(page, "charts")["specs"]
    assert HOSTILE in charts["pareto"]["params"][0]["value"]
    assert f"{HOSTILE}0" in {value.get("request") for value in values_of(charts["slots"], 1)}
    assert len(write_charts(data, tmp_path / "charts", "svg")) == len(make_charts(data))
    assert embedded(page, "manifest")[0]["arm"] == HOSTILE


def embedded(page: str, name: str) -> Any:
    found = re.search(rf'id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def values_of(spec: dict[str, Any], layer: int) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = spec["layer"][layer]["data"]["values"]
    return values


def loaded(path: Path) -> ReportData:
    return load_report([read_result(path)], slo=Slo(), price=Price(), reference=None, margin=DEFAULT_MARGIN)


def test_the_answer_names_winner_size_and_certainty(result: Path) -> None:
    data = load_report([read_result(result)], slo=Slo(), price=Price(), reference=None, margin=DEFAULT_MARGIN)
    sentences = verdict_sentences(data)
    assert sentences[0].startswith("continuous wins: 2.00x [2-2] the output tok/s of the next, static.")
    assert sentences[1].startswith("Against baseline: 4.00x the tokens, the whole answer 4.00x sooner, TTFT")
    assert "over 3 blocks" in sentences[2]
    assert any("Where the first token waited longest" in sentence for sentence in sentences)


@pytest.mark.parametrize(("num_blocks", "factor", "told_next"), [
    (3, 0.5, "Next: serve with static;"),
    (3, 1.0, "Next: take whichever of baseline and static is simpler to run."),
    (1, 0.5, "Next: measure on: the same command with --resume --blocks 3."),
])  # fmt: skip
def test_the_answer_says_what_to_do_next(
    tmp_path: Path, num_blocks: int, factor: float, told_next: str
) -> None:
    data = loaded(write_comparison(tmp_path, "baseline", "static", num_blocks=num_blocks, factor=factor))
    assert any(sentence.startswith(told_next) for sentence in answer_sentences(data))
    data.manifest.validity = Validity(invalid=("3 of 9 requests failed",))
    assert answer_sentences(data)[1].startswith("Next: remove the cause, then measure again")


def test_slots_are_not_shown_empty_where_requests_are_left_out(
    result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "MAX_BARS", 5)
    data = loaded(result)
    left_out_s = min(arm.timeline.bars[5].joined_s for arm in data.arms if arm.timeline)
    spec = make_charts(data)["slots"].spec
    assert spec["layer"][1]["encoding"]["x"]["scale"]["domain"] == [0, left_out_s]
    assert max(value["to"] for value in values_of(spec, 0)) == left_out_s


def test_every_chart_is_drawn(result: Path) -> None:
    data = loaded(result)
    charts = make_charts(data)
    curves = {"pareto", "throughput-latency", "ttft-cdf", "itl-cdf", "total-cdf", "drift", "lengths"}
    over_time = {"tokens-over-time", "batch-over-time", "batch-sizes"}
    assert set(charts) == {*curves, *over_time, "verdict", "budget", "slots"}
    for picture in charts.values():
        spec = description(picture, data.names, width=500)
        root = ElementTree.fromstring(vl_convert.vegalite_to_svg(spec, config=theme()))
        assert not any("nan" in str(v).lower() for item in root.iter() for v in item.attrib.values())
        assert picture.title in "".join(root.itertext())


def test_arms_are_switched_off_in_every_chart_that_has_them(result: Path) -> None:
    data = loaded(result)
    for name, picture in make_charts(data).items():
        spec = description(picture, data.names, width=500)
        assert spec["params"][0] == {"name": "shown", "value": data.names}
        if name not in ("verdict", "lengths"):
            spec["params"][0]["value"] = ["static"]
            drawn = vl_convert.vegalite_to_svg(spec, config=theme())
            assert drawn != vl_convert.vegalite_to_svg(
                description(picture, data.names, width=500), config=theme()
            ), name


def test_live_dead_and_empty_slots_differ_by_more_than_colour(result: Path) -> None:
    spec = make_charts(loaded(result))["slots"].spec
    heights = {v["phase"]: round(v["bottom"] - v["top"], 2) for v in values_of(spec, 1)}
    assert heights["tokens"] > 1.4 * heights["dead row"]
    lanes, bars = (layer["encoding"] for layer in spec["layer"][:2])
    assert lanes["x"]["scale"] == bars["x"]["scale"]
    assert [v["words"][0] for v in values_of(spec, 2)] == ["baseline", "static"]


def test_page_markdown_and_json_show_one_number(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = loaded(result)
    assert main(["report", str(result), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    page = render_page(data)
    assert embedded(page, "report") == told == json.loads(json.dumps(as_json(data)))
    for arm in told["arms"]:
        assert "steady_window" in arm
        for key, (low, high) in arm["intervals"].items():
            assert low <= arm["figures"][key] <= high
    assert main(["report", str(result), "--markdown"]) == 0
    markdown = capsys.readouterr().out
    headers, lines = figure_table(data)
    figures = [figure for metric in METRICS for figure in metric.figures]
    for figure, line in zip(figures, lines, strict=True):
        for arm, cell in zip(told["arms"], line[1 : len(headers)], strict=True):
            assert cell == figure.text(arm["figures"][figure.key])
            assert f"<td>{escape(cell)}</td>" in page
            if figure in compared_figures():
                row = next(r for r in markdown.splitlines() if r.startswith(f"| {arm['arm']} "))
                assert f" {markdown_text(cell)} |" in row
    assert "| intervals by ranks |" in markdown
    assert "The steady window, while load was as asked:" in markdown
    for ratio, contrast in zip(told["ratios"], data.found, strict=True):
        value = contrast.verdict and contrast.verdict.ratio
        assert (ratio["figure"], ratio["ratio"]) == (contrast.figure.key, value)
        assert f"<td>{contrast.text()}</td>" in page


def test_the_reason_of_a_doubt_stands_before_every_chart(result: Path) -> None:
    data = loaded(result)
    data.manifest.validity = Validity(invalid=("3 of 9 requests failed",))
    page = render_page(data)
    assert page.index("INVALID: 3 of 9 requests failed") < page.index('class="chart"')
    assert "so this does not count" in page
    first = verdict_sentences(data)[0]
    assert first.startswith("Nothing is decided: the runs are INVALID (3 of 9 requests failed)")
    assert "more blocks" not in " ".join(verdict_sentences(data))  # they would not mend it


def test_question_and_command(result: Path) -> None:
    data = loaded(result)
    assert question(data) == "What serves the null backend best at 1 user: baseline, static or continuous?"
    assert command(data) == (
        "lab compare --pad on --blocks 3 --variants baseline static continuous "
        "--backend null --model m --requests 60"
    )


def test_the_command_has_what_all_services_were_given(result: Path) -> None:
    data = loaded(result)
    for run in data.manifest.runs:
        assert run.service is not None
        settings = {"max_batch": 8, "n_threads": 1, "backend": "null", "prefill_chunk": 16}
        given = ["backend", "max_batch", "n_threads"]
        run.service = run.service.model_copy(update={"settings": settings, "given": given})
    assert command(data).startswith("MAX_BATCH=8 N_THREADS=1 lab compare ")
    data.manifest.runs[1].service.settings["max_batch"] = 4  # of one arm alone
    assert command(data).startswith("N_THREADS=1 lab compare ")


def test_the_steady_window_stands_on_the_page_and_in_json(result: Path) -> None:
    data = loaded(result)
    assert "The steady window" in render_page(data)
    told_of = as_json(data)["arms"][0]["steady_window"]
    assert told_of is None or 0 < told_of["share"] <= 1


def test_every_chart_names_its_series(result: Path) -> None:
    data = loaded(result)
    for name, series in (
        ("lengths", "prompts"),
        ("budget", "prefill"),
        ("slots", "dead row"),
        ("pareto", "static"),
        ("ttft-cdf", "static"),
    ):
        on_page = vl_convert.vegalite_to_svg(description(make_charts(data)[name], data.names), config=theme())
        assert "role-legend" in on_page
        assert f">{series}<" in on_page


def test_phases_have_no_colour_of_an_arm() -> None:
    phases = {*explanations.PHASE_COLOURS.values(), *explanations.TERM_COLOURS}
    assert not phases & {*ARM_COLOURS}


def test_the_chart_of_ratios_shows_the_intervals_of_the_table_and_no_other(result: Path) -> None:
    data = loaded(result)
    assert data.decision is not None
    found = data.decision.against_reference
    assert found[0].verdict is not None
    assert found[1].verdict is not None
    nothing = replace(found[0].verdict, word="can't tell", ratio=2.0, interval=(1e-4, 1e4))
    far = replace(found[1].verdict, word="better", ratio=0.5, interval=(0.01, 0.9))
    found[:2] = [replace(found[0], verdict=nothing), replace(found[1], verdict=far)]
    bare, cut, *_ = make_charts(data)["verdict"].spec["data"]["values"]
    assert bare["said"] == "output tok/s: can't tell, 2.00x better [too few blocks]"
    assert bare["low"] == bare["x"] == bare["high"]
    assert cut["said"].endswith(": 2.00x better [1.11-100]")
    assert cut["from"] == cut["low"]
    assert cut["to"] < cut["high"] == pytest.approx(100)  # it goes on, which an arrow says


def test_runs_that_do_not_count_have_no_chart_of_ratios(result: Path) -> None:
    data = loaded(result)
    data.manifest.validity = Validity(invalid=("3 of 9 requests failed",))
    assert "verdict" not in make_charts(data)
    page = render_page(data)
    fold = page.index("Figures of the runs that do not count")
    assert fold < page.index('class="chart"') < page.index("Ratios to baseline")


def test_what_is_told_of_several_arms_alike_is_told_once() -> None:
    lines = ["a: worse in TPOT p50", "b: better in TPOT p50", "c: worse in TPOT p50"]
    assert told_once(lines) == ["a, c: worse in TPOT p50", "b: better in TPOT p50"]


def test_a_slide_stands_alone(result: Path, tmp_path: Path) -> None:
    assert main(["report", str(result), "--markdown", "--slide", str(tmp_path / "slide.png")]) == 0
    header = (tmp_path / "slide.png").read_bytes()[:24]
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1200, 675)


def test_cost_follows_from_the_price(result: Path) -> None:
    data = load_report(
        [read_result(result)], slo=Slo(), price=Price(per_hour_usd=3.6), reference=None, margin=0.05
    )
    # 2 tokens/s at 0.001 USD a second: 500 USD per million.
    (baseline,) = [arm for arm in data.arms if arm.name == "baseline"]
    tokens_per_s = baseline.figures["output_tokens_per_s"]
    assert tokens_per_s is not None
    assert baseline.usd_per_million_tokens == pytest.approx(3.6 / (tokens_per_s * 3600) * 1e6)
    assert "USD per million output tokens" in render_page(data)
    assert read_price(None, 2e-6).per_million_tokens(123.0) == pytest.approx(2.0)


def test_markdown_and_png(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(result), "--markdown", "--png", str(tmp_path / "charts")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("### baseline, static, continuous on m")
    assert "| continuous |" in shown
    assert not result.with_suffix(".html").exists()
    charts = sorted(tmp_path.glob("charts/*.png"))
    assert len(charts) == len(make_charts(loaded(result)))
    assert all(chart.read_bytes().startswith(b"\x89PNG") for chart in charts)
