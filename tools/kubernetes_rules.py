"""Puts the alerts and field names of Prometheus into the manifest that its operator reads.

The rules have one home, `docker/prometheus`; `make dashboards` writes the manifest.
"""

from __future__ import annotations

from pathlib import Path

DOCKER = Path(__file__).parents[1] / "docker"
MANIFEST = DOCKER / "k8s/base/rules.yaml"
HEAD = """\
# Written by `make dashboards` from docker/prometheus.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: lab
spec:
  groups:
"""


def manifest() -> str:
    """Each file is a head, the line `groups:`, and the groups."""
    files = sorted((DOCKER / "prometheus").glob("*.yml"))
    parts = [text.partition("\ngroups:\n") for f in files for text in [f.read_text(encoding="utf-8")]]
    groups = "".join(groups for _, found, groups in parts if found)
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True))
