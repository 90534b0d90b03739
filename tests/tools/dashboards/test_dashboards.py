"""What can be said of the dashboards without Prometheus or Grafana's types; `tests/ops` asks those."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tools import dash
from tools.dashboards.__main__ import FILES, ROOT, main
from tools.dashboards.field_names import HISTOGRAMS, SERIES
from tools.dashboards.live import LIVE
from tools.dashboards.results import RESULTS

PANELS = [
    pytest.param(panel, id=f"{dashboard['uid']}-{panel['title']}")
    for dashboard in (LIVE, RESULTS)
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]


def test_the_files_are_what_the_sources_say() -> None:
    assert main(["--check"]) == 0


def test_a_stale_file_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(FILES, "harness/grafana_dash.json", lambda: "another")
    assert main(["--check"]) == 1
    assert capsys.readouterr().err == "harness/grafana_dash.json is not what `make dashboards` writes\n"


@pytest.mark.parametrize("dashboard", [LIVE, RESULTS], ids=["live", "results"])
def test_a_dashboard_is_classic_and_takes_its_data_source_from_a_variable(dashboard: dict[str, Any]) -> None:
    assert dashboard["schemaVersion"] == 42
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_has_unit_description_and_a_source_that_is_chosen(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert {source["uid"] for source in sources} == {"${datasource}"}
    ref_ids = [target["refId"] for target in panel["targets"]]
    assert len(ref_ids) == len(set(ref_ids))
    assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_a_band_is_filled_between_series_that_exist() -> None:
    for panel in RESULTS["panels"]:
        legends = {target["legendFormat"] for target in panel.get("targets", ())}
        for override in panel.get("fieldConfig", {}).get("overrides", ()):
            if override["matcher"]["id"] != "byName":
                continue
            named = [override["matcher"]["options"]]
            named += [p["value"] for p in override["properties"] if p["id"] == "custom.fillBelowTo"]
            assert legends.issuperset(named)


def test_one_version_of_grafana() -> None:
    """docker/compose.yml has it; `make dash` and the types of `make test-ops` are of the same one."""
    (image,) = dash.IMAGE.findall((ROOT / "docker/compose.yml").read_text())
    assert dash.grafana_command("docker", 1, 2)[-1] == image
    makefile = (ROOT / "Makefile").read_text()
    assert "docker/compose.yml)" in next(x for x in makefile.splitlines() if x.startswith("GRAFANA :="))


def test_the_documented_names_are_those_of_the_rules() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    assert dict(re.findall(r"^\| `(vllm:\w+)` \| `(\w+)` \|", text, re.MULTILINE)) == SERIES | HISTOGRAMS


def test_one_replica_that_is_not_ready_shows_and_a_gpu_is_counted_once() -> None:
    """Of two replicas one is down: a sum is 1 still. Of two services on one GPU a sum is twice its power."""
    shared = r"lab_(ready|gpu_(utilization_ratio|memory_\w+_bytes|power_watts))\{"
    queries = [target["expr"] for panel in LIVE["panels"] for target in panel.get("targets", ())]
    found = {re.search(shared, query)[1]: query.split()[0] for query in queries if re.search(shared, query)}  # type: ignore[index]
    assert found.pop("ready") == "min"
    assert len(found) == 4
    assert set(found.values()) == {"max"}


def test_energy_a_token_is_not_drawn_as_power() -> None:
    units = {
        panel["fieldConfig"]["defaults"]["unit"]
        for panel in LIVE["panels"]
        for target in panel.get("targets", ())
        if "lab_gpu_energy_joules_total" in target["expr"]
    }
    assert units == {"joule"}
