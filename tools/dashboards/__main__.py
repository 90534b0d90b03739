"""`make dashboards` writes the files; with --check it says which of them are not what this would write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.dashboards.field_names import field_names
from tools.dashboards.live import LIVE
from tools.dashboards.results import RESULTS
from tools.kubernetes_rules import MANIFEST, manifest

ROOT = Path(__file__).parents[2]


def _json(dashboard: dict[str, Any]) -> str:
    return json.dumps(dashboard, indent=1) + "\n"


FILES: dict[str, Callable[[], str]] = {
    "docker/grafana/dashboards/live.json": lambda: _json(LIVE),
    "docker/grafana/dashboards/results.json": lambda: _json(RESULTS),
    "harness/grafana_dash.json": lambda: _json(LIVE),
    "docker/prometheus/field_names.yml": field_names,
    str(MANIFEST.relative_to(ROOT)): manifest,  # made of the file before it
}


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        stale = [name for name in FILES if not _is_current(name)]
        for name in stale:
            print(f"{name} is not what `make dashboards` writes", file=sys.stderr)
        return int(bool(stale))
    for name, text in FILES.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), encoding="utf-8")
    return 0


def _is_current(name: str) -> bool:
    path = ROOT / name
    return path.exists() and path.read_text(encoding="utf-8") == FILES[name]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
