"""Every panel compiled against Grafana's own types: Grafana itself passes over a key that it does not know.

The types know neither the ids of units nor the keys of a query, so those are held against Grafana's list of
formats and the Prometheus data source's own type. A planted mistake of each kind has to be found.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.dashboards.live import LIVE
from tools.dashboards.results import RESULTS

pytestmark = pytest.mark.ops

TYPES = Path(__file__).parents[2] / ".ops"
PANELS = [panel for board in (LIVE, RESULTS) for panel in board["panels"] if panel["type"] != "row"]
CONFIG = {
    "compilerOptions": {
        "strict": True,
        "noEmit": True,
        "skipLibCheck": True,
        "types": [],
        "target": "es2020",
        "module": "esnext",
        "moduleResolution": "bundler",
    },
    "include": ["panels/*.ts"],
}
HEAD = """
import type { Dashboard, Panel } from '@grafana/schema';
import type * as timeseries from '../node_modules/@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/types.gen';
import type * as stat from '../node_modules/@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/types.gen';
import type * as heatmap from '../node_modules/@grafana/schema/dist/types/raw/composable/heatmap/panelcfg/x/types.gen';
import type * as table from '../node_modules/@grafana/schema/dist/types/raw/composable/table/panelcfg/x/types.gen';
import type { Prometheus } from '../grafana-prometheus/dist/types/dataquery';
// JSON has the text of an enum's member where TypeScript wants the member.
type Plain<T> = T extends string ? `${T}` : T extends (infer U)[] ? Plain<U>[]
  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
type Target = Plain<Omit<Prometheus, 'datasource'>> & { datasource: { type: string; uid: string } };
"""
CUSTOM = {"timeseries": "timeseries.FieldConfig", "heatmap": "heatmap.FieldConfig"}


def source_of(panel: dict[str, Any]) -> str:
    """The panel as typed literals."""
    kind = panel["type"]
    panel = copy.deepcopy(panel)
    custom = panel["fieldConfig"]["defaults"].pop("custom", {})
    rest = {name: value for name, value in panel.items() if name not in ("options", "targets")}
    return (
        f"{HEAD}\nexport const panel: Plain<Panel> = {json.dumps(rest)};\n"
        f"export const custom: Plain<{CUSTOM.get(kind, 'Record<string, never>')}> = {json.dumps(custom)};\n"
        f"export const options: Plain<{kind}.Options> = {json.dumps(panel['options'])};\n"
        f"export const targets: Target[] = {json.dumps(panel['targets'])};\n"
    )


def compile_all(sources: dict[str, str]) -> dict[str, list[str]]:
    """The errors of each source by its name."""
    folder = TYPES / "panels"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.ts"):
        old.unlink()
    for name, source in sources.items():
        (folder / f"{name}.ts").write_text(source)
    (TYPES / "tsconfig.json").write_text(json.dumps(CONFIG))
    program = ["node", str(TYPES / "node_modules/typescript/bin/tsc"), "-p", str(TYPES / "tsconfig.json")]
    output = subprocess.run(program, capture_output=True, text=True, check=False, cwd=TYPES).stdout
    found: dict[str, list[str]] = {name: [] for name in sources}
    for line in output.splitlines():
        if match := re.match(r"panels/(\w+)\.ts\(", line):
            found[match[1]].append(line)
        else:
            assert line.startswith(" "), line
    return found


def units() -> set[str]:
    text = (TYPES / "grafana-data/dist/cjs/valueFormats/categories.cjs").read_text()
    return set(re.findall(r'\bid: "([^"]+)"', text))


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    assert (TYPES / ".npm").exists(), "Grafana's types are not in .ops: `make test-ops` brings them, with npm"


def test_every_panel_compiles() -> None:
    errors = compile_all({f"panel{number}": source_of(panel) for number, panel in enumerate(PANELS)})
    assert not [line for lines in errors.values() for line in lines]


def test_the_frames_compile() -> None:
    """But for annotations: the schema does not know the Prometheus data source's keys of one."""
    apart = ("panels", "annotations")
    boards = {
        board["uid"].replace(
            "-", "_"
        ): f"{HEAD}\nexport const board: Plain<Omit<Dashboard, 'panels' | 'annotations'>> = "
        + json.dumps({name: value for name, value in board.items() if name not in apart})
        + ";\n"
        for board in (LIVE, RESULTS)
    }
    assert not [line for lines in compile_all(boards).values() for line in lines]


def test_every_unit_is_one_of_grafanas() -> None:
    known = units()
    assert len(known) > 150
    used = {panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS}
    assert used <= known
    assert "secs" not in known


def _plant(change: Callable[[dict[str, Any]], object], kind: str = "timeseries") -> str:
    panel = copy.deepcopy(next(panel for panel in PANELS if panel["type"] == kind))
    change(panel)
    return source_of(panel)


def test_a_planted_mistake_of_each_kind_is_found() -> None:
    planted = {
        "option": _plant(lambda p: p["options"].update(legnd={})),
        "deep_option": _plant(lambda p: p["options"]["legend"].update(showLegnd=True)),
        "enum": _plant(lambda p: p["options"]["tooltip"].update(mode="many")),
        "custom": _plant(lambda p: p["fieldConfig"]["defaults"]["custom"].update(lineWith=2)),
        "custom_enum": _plant(lambda p: p["fieldConfig"]["defaults"]["custom"].update(drawStyle="linear")),
        "kind_of_value": _plant(lambda p: p["fieldConfig"]["defaults"].update(decimals="two")),
        "grid": _plant(lambda p: p["gridPos"].update(width=8)),
        "panel": _plant(lambda p: p.update(descripton="x")),
        "target": _plant(lambda p: p["targets"][0].update(legend="x")),
        "target_format": _plant(lambda p: p["targets"][0].update(format="matrix")),
        "stat": _plant(lambda p: p["options"].update(colorMode="values"), "stat"),
        "heatmap": _plant(lambda p: p["options"]["color"].update(scheme=3), "heatmap"),
        "table": _plant(lambda p: p["options"].update(showHeaders=True), "table"),
    }
    assert [name for name, errors in compile_all(planted).items() if not errors] == []
