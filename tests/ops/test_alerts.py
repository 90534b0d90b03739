"""Alert rules: promtool's own cases, and one alert through a real Prometheus to a real Alertmanager."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml

from harness.results.metrics import compared_figures
from tests.ops.servers import PROMETHEUS_FILES, ROOT, program, prometheus, running
from tests.services.served import free_port, until

pytestmark = pytest.mark.ops

RULES = PROMETHEUS_FILES / "alerts.yml"
CASES = Path(__file__).parent / "alerts_test.yml"
ALERTS = [rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_the_rules_and_their_cases_pass() -> None:
    files = [str(RULES), str(PROMETHEUS_FILES / "field_names.yml")]
    subprocess.run([program("promtool"), "check", "rules", *files], check=True)
    subprocess.run([program("promtool"), "test", "rules", str(CASES)], check=True, cwd=CASES.parent)


def test_each_alert_has_a_firing_and_a_silent_case_and_its_place_in_the_handbook() -> None:
    firing, silent, *_ = yaml.safe_load(CASES.read_text())["tests"]
    assert [case["alertname"] for case in firing["alert_rule_test"] if case["exp_alerts"]] == ALERTS
    assert [c["alertname"] for c in silent["alert_rule_test"] if not c.get("exp_alerts")] == ALERTS
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert headings == ALERTS


def test_the_rule_for_regressions_knows_which_way_a_figure_is_worse() -> None:
    (rate,) = set(re.findall(r'metric[=!]~"([^"]+)"', RULES.read_text()))
    for figure in compared_figures():
        assert bool(re.fullmatch(rate, figure.key)) == figure.metric.higher_is_better, figure.key


def test_an_alert_reaches_a_real_alertmanager(tmp_path: Path) -> None:
    """Nothing listens where Prometheus scrapes, so the service is not ready."""
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "1s"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "alertmanager.yml").write_text("route: {receiver: none}\nreceivers: [{name: none}]\n")
    port = free_port()
    command = [
        *(program("prometheus-alertmanager"), f"--config.file={tmp_path / 'alertmanager.yml'}"),
        *(f"--storage.path={tmp_path / 'alertmanager'}", "--cluster.listen-address="),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    alerts_url = f"http://127.0.0.1:{port}/api/v2/alerts"
    nobody = {"gone": f"127.0.0.1:{free_port()}"}

    def received() -> set[str]:
        return {alert["labels"]["alertname"] for alert in httpx.get(alerts_url).json()}

    with (
        running(command, f"http://127.0.0.1:{port}/-/ready", tmp_path),
        prometheus(tmp_path, nobody, alertmanager=f"127.0.0.1:{port}", rules=str(tmp_path / "alerts.yml")),
    ):
        until(lambda: received() == {"LabNotReady"}, 60)
