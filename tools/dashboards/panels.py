"""Panels and the frame around them, in Grafana's classic JSON.

Schema version 42 is the last classic one: Grafana 13 refuses files of the next. Grafana ignores a key it does
not know, so a typing error would pass there; `make test-ops` compiles all panels against Grafana's own types.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]

SCHEMA_VERSION = 42
COLUMNS = 24
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def target(expr: str, legend: str, **extra: Any) -> Json:
    return {"datasource": DATA_SOURCE, "expr": expr, "legendFormat": legend, "range": True, **extra}


def _lettered(targets: Iterable[Json]) -> list[Json]:
    return [{**one, "refId": chr(ord("A") + index)} for index, one in enumerate(targets)]


def _panel(kind: str, title: str, description: str, unit: str, targets: Iterable[Json]) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATA_SOURCE,
        "targets": _lettered(targets),
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
    }


def lines(
    title: str, description: str, unit: str, targets: Iterable[Json], *, bands: Sequence[str] = ()
) -> Json:
    """Lines over time. A band names its series `B low` and `B high` and is filled between them.

    With bands, other series of such names are dashed.
    """
    panel = _panel("timeseries", title, description, unit, targets)
    panel["fieldConfig"]["defaults"]["custom"] = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 0,
        "showPoints": "auto",
        "spanNulls": 172_800_000 if bands else False,
    }
    if bands:
        panel["fieldConfig"]["overrides"] = [_DASHED, *(part for band in bands for part in _band(band))]
    panel["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel


_UNNAMED = {"id": "custom.hideFrom", "value": {"legend": True, "tooltip": False, "viz": False}}
_DASHED = {
    "matcher": {"id": "byRegexp", "options": "/ (low|high)$/"},
    "properties": [{"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [2, 6]}}, _UNNAMED],
}


def _band(name: str) -> list[Json]:
    """Grafana fills below a series down to another by its whole name, never by a pattern."""
    no_line = {"id": "custom.lineWidth", "value": 0}
    filled = [{"id": "custom.fillBelowTo", "value": f"{name} low"}, {"id": "custom.fillOpacity", "value": 20}]
    return [
        {"matcher": {"id": "byName", "options": f"{name} low"}, "properties": [no_line, _UNNAMED]},
        {"matcher": {"id": "byName", "options": f"{name} high"}, "properties": [no_line, _UNNAMED, *filled]},
    ]


def stat(
    title: str, description: str, unit: str, targets: Iterable[Json], steps: Mapping[float, str] | None = None
) -> Json:
    """The last value; `steps` maps the least value of a colour to it."""
    panel = _panel("stat", title, description, unit, targets)
    thresholds: list[Json] = [{"color": "text", "value": None}]
    thresholds += [{"color": color, "value": value} for value, color in (steps or {}).items()]
    panel["fieldConfig"]["defaults"] |= {
        "color": {"mode": "thresholds"},
        "thresholds": {"mode": "absolute", "steps": thresholds},
    }
    panel["options"] = {
        "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "value_and_name",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
    }
    return panel


def heatmap(title: str, description: str, unit: str, expr: str) -> Json:
    """Buckets of a histogram over time."""
    panel = _panel("heatmap", title, description, unit, [target(expr, "{{le}}", format="heatmap")])
    panel["options"] = {
        "calculate": False,
        "color": {
            "mode": "scheme",
            "scheme": "Blues",
            "steps": 64,
            "exponent": 0.5,
            "fill": "blue",
            "reverse": False,
        },
        "cellGap": 1,
        "filterValues": {"le": 1e-9},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": False},
        "legend": {"show": True},
        "exemplars": {"color": "orange"},
        "yAxis": {"unit": unit, "axisPlacement": "left"},
    }
    return panel


def table(title: str, description: str, unit: str, targets: Iterable[Json]) -> Json:
    instant = [{**one, "range": False, "instant": True, "format": "table"} for one in targets]
    panel = _panel("table", title, description, unit, instant)
    panel["options"] = {"showHeader": True, "cellHeight": "sm", "frameIndex": 0}
    panel["transformations"] = [{"id": "merge", "options": {}}]
    return panel


def variable(name: str, label: str, query: str, *, one: bool = False) -> Json:
    """A label's values, all of them chosen at first; with `one`, one of them is chosen."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATA_SOURCE,
        "query": {"qryType": 1, "query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": not one,
        "includeAll": not one,
        "allValue": ".*",
        "current": {"text": "", "value": ""} if one else {"text": ["All"], "value": ["$__all"]},
        "options": [],
    }


def annotation(name: str, expr: str, title: str, color: str) -> Json:
    return {
        "name": name,
        "datasource": DATA_SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": color,
        "expr": expr,
        "titleFormat": title,
        "step": "60s",
    }


def dashboard(
    uid: str,
    title: str,
    description: str,
    rows: Mapping[str, Sequence[Json]],
    variables: Sequence[Json],
    annotations: Sequence[Json] = (),
    *,
    since: str = "now-1h",
) -> Json:
    """`rows` maps a row's title to its panels, three abreast."""
    source = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "current": {"text": "", "value": ""},
        "options": [],
    }
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["batching-lab"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": since, "to": "now"},
        "timezone": "browser",
        "annotations": {"list": list(annotations)},
        "templating": {"list": [source, *variables]},
        "links": [],
        "panels": _laid_out(rows),
    }


def _laid_out(rows: Mapping[str, Sequence[Json]]) -> list[Json]:
    laid_out: list[Json] = []
    y = 0
    width, height = COLUMNS // 3, 8
    for title, panels in rows.items():
        grid = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        laid_out.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": grid})
        y += 1
        for index, panel in enumerate(panels):
            grid = {"x": index % 3 * width, "y": y + index // 3 * height, "w": width, "h": height}
            laid_out.append({**panel, "gridPos": grid})
        y += -(-len(panels) // 3) * height
    return [{"id": number, **panel} for number, panel in enumerate(laid_out, 1)]
