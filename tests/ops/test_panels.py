"""Every panel's query on a real Prometheus that scrapes real services: an error or an empty answer fails.

Then every series of the services is renamed in the queries: some panel has to become empty by it.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.history import store
from harness.history.exposition import NAMES, to_openmetrics
from harness.history.series import SHOWN, chained, marks
from services.strategies import VARIANTS
from tests.harness.history.made_history import held, sha
from tests.ops.servers import ROOT, Prometheus, program, prometheus, traffic
from tests.services.served import lab_serve
from tools.dashboards import field_names
from tools.dashboards.live import LIVE
from tools.dashboards.results import ENDS, FIGURES, RESULTS

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]

FILLED = {
    "$__rate_interval": "10s",
    "$__interval": "1d",
    "$__range": "60d",
    "$strategy": ".*",
    "$backend": "torch",
    "$model": "lab-26m",
    "$load": "closed 16 x64",
    "$machine": "machine 2",
    "$metric": "ttft_p50_ms",
}
REAL_NIGHTS = ROOT / "docs/measured/nights"
ARMS = (*VARIANTS, "continuous MAX_BATCH=8")
NUM_NIGHTS, STEP_AT = 60, 40
NUM_MACHINES, INVALID_NIGHTS, CAUTION_NIGHT = 3, range(5, 59, 6), 2
"""The machines take turns; these nights are of the last one, which has the newest night as well."""
DAY_S = 86_400
LIVE_FILLED = {**FILLED, "$model": ".*"}
SCRAPED_FOR_S = 16.0
RESULT_SERIES = re.compile("lab_(result|comparison|chained)")
NOT_IN_PANELS = re.compile(
    r"(lab_engine_)?process_virtual_memory_bytes$|lab_engine_process_(start_time_seconds|open_fds|max_fds)$"
)


def filled(expr: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


def queries(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    variables = LIVE_FILLED if dashboard is LIVE else FILLED
    panels = [(p["title"], t["expr"]) for p in dashboard["panels"] for t in p.get("targets", ())]
    return [(title, filled(expr, variables)) for title, expr in panels]


def made_results() -> pd.DataFrame:
    """Sixty nights up to now; each strategy is held against the commit of the night before."""
    noise = np.random.default_rng(0).normal(size=NUM_NIGHTS) * 0.006
    first = pd.Timestamp.now(tz="UTC") - pd.Timedelta(days=NUM_NIGHTS)
    lines = []
    for night, variant, metric in product(range(NUM_NIGHTS), ARMS, SHOWN):
        facts = {
            "started_at": first + pd.Timedelta(days=night), "strategy": variant, "metric": metric,
            "backend": "torch", "model": "lab-26m", "load": "closed 16 x64",
        }  # fmt: skip
        ratio = float(np.exp(noise[night])) * (1.05 if night == STEP_AT else 1)
        against = f"{variant} at {sha(night)}"
        lines.append(held(night, sha(night), sha(night + 1), ratio, **facts, against=against))
        level = 10.0 * (1.05 if night >= STEP_AT else 1)
        validity = "INVALID" if night in INVALID_NIGHTS else "CAUTION" if night == CAUTION_NIGHT else "VALID"
        facts |= {"kind": "result", "against": None, "validity": validity}
        lines.append(held(night, "", sha(night + 1), level, **facts))
    return pd.DataFrame(lines)


def write_results(folder: Path, rows: pd.DataFrame) -> None:
    """As blocks of the data base."""
    (folder / "results.om").write_text(to_openmetrics(rows))
    write = ["tsdb", "create-blocks-from", "openmetrics", str(folder / "results.om"), str(folder / "data")]
    subprocess.run([program("promtool"), *write], check=True, capture_output=True)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, float, str]]:
    """Prometheus, the time up to which it scraped, and the page of one service."""
    folder = tmp_path_factory.mktemp("prometheus")
    write_results(folder, pd.concat([made_results(), store.read(REAL_NIGHTS).rows], ignore_index=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'fake_gpu'}:{Path(__file__).parents[2]}")
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        slow = {"NULL_STEP_MS": 5}
        with (
            lab_serve(VARIANT="continuous", **slow) as first,
            lab_serve(VARIANT="static", **slow) as second,
            lab_serve(VARIANT="continuous", BACKEND="torch", MODEL="lab-26m") as third,
        ):
            for service in (first, second, third):
                service.wait_ready(300)
            urls = [first.url, second.url, third.url]
            targets = {url: url.removeprefix("http://") for url in urls}
            with prometheus(folder, targets) as scraping:
                with traffic(urls):
                    time.sleep(SCRAPED_FOR_S)
                page = httpx.get(first.url + "/metrics").text
                yield scraping, time.time() - 1, page


def is_empty(scraping: Prometheus, query: str, at_s: float) -> bool:
    if RESULT_SERIES.search(query):
        since_s = 0 if "[60d]" in query else NUM_NIGHTS * DAY_S
        return not scraping.values(query, since_s=since_s, step_s=DAY_S, at_s=at_s)
    return not scraping.values(query, since_s=SCRAPED_FOR_S, at_s=at_s)


@pytest.mark.parametrize("dashboard", [LIVE, RESULTS], ids=["live", "results"])
def test_every_query_has_an_answer(watched: Any, dashboard: dict[str, Any]) -> None:
    scraping, at_s, _ = watched
    assert not [query for query in queries(dashboard) if is_empty(scraping, query[1], at_s)]


def test_the_dashboard_draws_what_the_page_draws(watched: Any) -> None:
    scraping, at_s, _ = watched
    rows = made_results()
    (mark,) = [m for m in marks(rows) if m.strategy == "static" and m.metric == "ttft_p50_ms" and m.of_ratios]
    assert mark.commit == sha(STEP_AT + 1)
    chain = 'lab_chained_ratio{strategy="static",metric="ttft_p50_ms",load="closed 16 x64"}'
    found = scraping.api("query", query=f"last_over_time({chain}[90d])", time=at_s)["result"]
    drawn = {one["metric"]["commit"]: float(one["value"][1]) for one in found}
    own = chained(rows)
    own = own[(own["strategy"] == "static") & (own["metric"] == "ttft_p50_ms")]
    assert drawn == pytest.approx(dict(zip(own["commit"], own["value"], strict=True)))


def test_real_nights_are_drawn(watched: Any) -> None:
    """Three nights, each commit against the one before."""
    scraping, _, _ = watched
    real = store.read(REAL_NIGHTS).rows
    who = real[~real["is_old"]].iloc[-1]
    own = real[~real["is_old"] & (real["load"] == who["load"])]
    at_s = real["started_at"].max().timestamp() + 60
    chosen = {
        "$backend": who["backend"],
        "$model": who["model"],
        "$load": who["load"],
        "$machine": who["machine"],
    }
    chosen = {**FILLED, **chosen, "$metric": "output_tokens_per_s"}
    told = {name for metric, (name, _) in NAMES.items() if (own["metric"] == metric).any()}
    told |= {"lab_chained_ratio", "lab_comparison_ratio"}
    targets = [target for panel in RESULTS["panels"] for target in panel.get("targets", ())]
    asked = [
        filled(target["expr"], chosen)
        for target in targets
        if target["legendFormat"].startswith(who["strategy"])
        and re.search(r"lab_\w+?(?=(_low|_high)?\{)", target["expr"]).group() in told
    ]
    assert len(asked) == len(told) * 3 > 12
    assert not [query for query in asked if is_empty(scraping, query, at_s)]
    chain = 'count(last_over_time(lab_chained_ratio{metric="output_tokens_per_s",load="%s"}[60d]))'
    (counted,) = scraping.api("query", query=chain % who["load"], time=at_s)["result"]
    assert counted["value"][1] == "3"


def resolved(scraping: Prometheus, dashboard: dict[str, Any], at_s: float) -> dict[str, str]:
    """What a person sees first: all values where several may be chosen, else the first one."""
    chosen: dict[str, str] = {}
    for variable in dashboard["templating"]["list"][1:]:
        query = filled(variable["query"]["query"], chosen)
        series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()
        span = {"start": at_s - 90 * DAY_S, "end": at_s}
        values = sorted(scraping.api(f"label/{label}/values", **{"match[]": series}, **span))
        assert values, query
        chosen[f"${variable['name']}"] = ".*" if variable["includeAll"] else values[0]
    return chosen


def test_live_opens_with_values(watched: Any) -> None:
    scraping, at_s, _ = watched
    assert set(resolved(scraping, LIVE, at_s).values()) == {".*"}


@pytest.mark.parametrize("step_s", [480, 3600, 7200, DAY_S], ids=lambda step_s: f"{step_s} s")
def test_an_annotation_is_drawn_at_its_night_at_any_step(watched: Any, step_s: int) -> None:
    """The step is the range by the width. Grafana draws where the value is above 0."""
    scraping, at_s, _ = watched
    for annotation, nights in zip(
        RESULTS["annotations"]["list"], (INVALID_NIGHTS, [CAUTION_NIGHT]), strict=True
    ):
        query = filled(annotation["expr"], {**FILLED, "$__interval": f"{step_s}s", "$strategy": "static"})
        times = {"start": at_s - NUM_NIGHTS * DAY_S, "end": at_s, "step": step_s}
        found = scraping.api("query_range", query=query, **times)["result"]
        drawn = [one["metric"]["commit"] for one in found if any(float(v) > 0 for _, v in one["values"])]
        assert sorted(drawn) == [sha(night + 1) for night in nights]
        assert all(len(one["values"]) == 1 for one in found)


def test_the_validity_is_that_of_the_latest_run(watched: Any) -> None:
    """Grafana shows the last value of the range; an older night was INVALID."""
    scraping, at_s, _ = watched
    (panel,) = (panel for panel in RESULTS["panels"] if panel["title"] == "Validity")
    assert panel["options"]["reduceOptions"]["calcs"] == ["lastNotNull"]
    query = filled(panel["targets"][0]["expr"], FILLED)
    times = {"start": at_s - NUM_NIGHTS * DAY_S, "end": at_s, "step": DAY_S}
    found = scraping.api("query_range", query=query, **times)["result"]
    assert {one["metric"]["strategy"]: float(one["values"][-1][1]) for one in found} == dict.fromkeys(
        ARMS, 1.0
    )
    assert min(float(value) for one in found for _, value in one["values"]) == 0


def test_machines_are_not_joined_and_every_arm_is_drawn(watched: Any) -> None:
    scraping, at_s, _ = watched
    (panel,) = (panel for panel in RESULTS["panels"] if panel["title"] == FIGURES["ttft_p50_seconds"][0])
    times = {"start": at_s - NUM_NIGHTS * DAY_S, "end": at_s, "step": DAY_S}
    drawn = {}
    for one in (t for t in panel["targets"] if not t["legendFormat"].endswith(tuple(ENDS))):
        for found in scraping.api("query_range", query=filled(one["expr"], FILLED), **times)["result"]:
            drawn[found["metric"]["strategy"]] = len(found["values"])
    # An INVALID night has no value.
    assert drawn == dict.fromkeys(ARMS, NUM_NIGHTS // NUM_MACHINES - len(INVALID_NIGHTS))


def test_both_strategies_of_both_backends_are_laid_over_one_another(watched: Any) -> None:
    scraping, at_s, _ = watched
    seen = {(s["strategy"], s["backend"]) for s in scraping.values("lab_ready == 1", at_s=at_s)}
    assert seen == {("continuous", "null"), ("static", "null"), ("continuous", "torch")}


def test_a_series_that_is_renamed_empties_a_panel(watched: Any) -> None:
    """The query is changed instead of the service: what it asks for is then as absent as after a renaming."""
    scraping, at_s, page = watched
    in_panels = [query for dashboard in (LIVE, RESULTS) for _, query in queries(dashboard)]
    counted = [(f.name, f.type) for f in text_string_to_metric_families(page)]
    figures = [*(f"lab_result_{name}" for name in FIGURES), "lab_comparison_ratio", "lab_chained_ratio"]
    results = ["lab_result_valid", *(name + end for name in figures for end in ("", *ENDS.values()))]
    names = [name + ("_total" if kind == "counter" else "") for name, kind in counted] + results
    unwatched = [name for name in names if not NOT_IN_PANELS.match(name)]
    assert len(unwatched) > 55
    for name in unwatched:
        word = re.compile(rf"\b{name}(?=\b|_bucket|_sum|_count)")
        asking = [query for query in in_panels if re.search(rf"\b{name}(_bucket|_sum|_count)?\b", query)]
        assert asking, f"no panel shows {name}"
        renamed = [word.sub("renamed", query) for query in asking]
        assert any(is_empty(scraping, query, at_s) for query in renamed), name


def test_the_queries_of_vllms_dashboard_have_answers(watched: Any) -> None:
    """As its Grafana file asks them: by `model_name`, counters as rates, histograms by bucket and by mean."""
    scraping, at_s, _ = watched
    (torch,) = scraping.values('lab_ready{backend="torch"}', at_s=at_s)
    chosen = f'model_name="{torch["model"]}"'
    asked = [f"sum by(le) (rate({name}_bucket{{{chosen}}}[1m]))" for name in field_names.HISTOGRAMS]
    asked += [
        f"rate({name}_sum{{{chosen}}}[1m]) / rate({name}_count{{{chosen}}}[1m])"
        for name in field_names.HISTOGRAMS
    ]
    asked += [f"{name}{{{chosen}}}" for name in field_names.SERIES]
    asked.append(f"sum by(finished_reason) (increase(vllm:request_success_total{{{chosen}}}[1m]))")
    assert not [query for query in asked if is_empty(scraping, query, at_s)]
    renamed = [query.replace("vllm:", "vlm:") for query in asked]
    assert all(is_empty(scraping, query, at_s) for query in renamed)
    ended = scraping.values("vllm:request_success_total", at_s=at_s)
    assert {one["finished_reason"] for one in ended} >= {"stop", "length", "abort"}


def test_an_exemplar_leads_from_a_slow_bucket_to_a_request(watched: Any) -> None:
    scraping, at_s, _ = watched
    found = scraping.api(
        "query_exemplars",
        query="lab_time_to_first_token_seconds_bucket",
        start=at_s - 60,
        end=at_s + 5,
    )
    assert all(one["exemplars"][0]["labels"]["request_id"].startswith("cmpl-") for one in found)
    assert found
