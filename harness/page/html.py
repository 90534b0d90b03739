"""One HTML page that opens offline: words first, then charts, tables, machine and validity.

What enters is `ReportData`; what leaves is a string with everything inlined: no font, script or picture is
fetched. Charts come from `charts` and `bars`, sentences from `words`. Derives no figure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import numpy as np

from harness.comparing.contrasts import contrast_table
from harness.page.bars import budget_bars, lane_legend, lanes
from harness.page.charts import Series, chart
from harness.page.data import ArmData, ReportData
from harness.page.style import SCRIPT, STYLE
from harness.page.summary import (
    arm_table,
    budget_table,
    contrast_sentences,
    setting_lines,
    verdict_sentences,
)
from harness.results.formulas import Floats

MAX_CURVE_POINTS = 160
TIMELINE_STRETCH = 3.0
"""All timelines show as much time as this many of the shortest, so that single steps stay visible."""
Table = tuple[list[str], list[list[str]]]


def make_charts(data: ReportData) -> dict[str, str]:
    """All single charts by file name, in the order of the page."""
    style = {name: index for index, name in enumerate(data.names)}
    charts = {"throughput-latency": _throughput_latency(data, style)}
    first_load = [arm for arm in data.arms if arm.load == data.arms[0].load]
    kind = "ITL" if all(arm.itl_is_per_token for arm in first_load) else "inter-chunk latency"
    for name, words, latencies in (
        ("ttft-cdf", "time to first token, from schedule (ms)", [arm.ttft_ms for arm in first_load]),
        ("itl-cdf", f"{kind} (ms)", [arm.itl_ms for arm in first_load]),
        ("total-cdf", "whole answer, from schedule (ms)", [arm.total_ms for arm in first_load]),
    ):
        pairs = zip(first_load, latencies, strict=True)
        series = [Series(arm.name, _cdf(values), style[arm.name]) for arm, values in pairs if len(values)]
        if series:
            charts[name] = chart(words, series, words, "share of requests", log_x=True, y_high=1.0)
    if data.slo is not None and len(data.loads) > 1:
        series = [
            Series(
                name,
                sorted(
                    (arm.offered, arm.goodput_per_s)
                    for arm in data.arms
                    if arm.name == name and arm.goodput_per_s is not None
                ),
                style[name],
                has_markers=True,
            )
            for name in data.names
        ]
        unit = "requests/s asked for" if data.is_open else "users"
        charts["goodput"] = chart("goodput over load", series, unit, "goodput (requests/s)")
    budgets = [(arm.name, arm.budget.means()) for arm in first_load if arm.budget]
    if budgets:
        charts["budget"] = budget_bars(budgets, "where the time to the first token went")
    timed = [arm for arm in first_load if arm.timeline]
    spans_s = [arm.timeline.span_s for arm in timed if arm.timeline]
    shown_s = min(max(spans_s), TIMELINE_STRETCH * min(spans_s)) if spans_s else 0.0
    for arm in timed:
        assert arm.timeline is not None
        name = f"timeline-{arm.name.replace(' ', '-')}"
        charts[name] = lanes(arm.timeline, f"slots of {arm.name}", shown_s)
    return charts


def _throughput_latency(data: ReportData, style: dict[str, int]) -> str:
    """One point a run; a line through the medians of the loads where there are several."""
    series: list[Series] = []
    for name in data.names:
        own = sorted((arm for arm in data.arms if arm.name == name), key=lambda arm: arm.offered)
        if len(own) > 1:
            points = [
                (arm.middle_tokens_per_s, float(np.median(arm.ttft_ms))) for arm in own if len(arm.ttft_ms)
            ]
        else:
            points = list(zip(own[0].tokens_per_s, own[0].ttft_p50_ms, strict=True))
        series.append(Series(name, points, style[name], has_line=len(own) > 1, has_markers=True))
    return chart(
        "throughput and latency", series, "output tokens/s", "TTFT p50, from schedule (ms)", log_y=True
    )


def _cdf(values: Floats) -> list[tuple[float, float]]:
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_CURVE_POINTS)).astype(int))
    return [(float(values[i]), (int(i) + 1) / len(values)) for i in places]


def render_page(data: ReportData, title: str) -> str:
    charts = make_charts(data)
    first, *rest = verdict_sentences(data)
    lane_names = [name for name in charts if name.startswith("timeline-")]
    sections = [
        f"<h1>{escape(title)}</h1>",
        _validity_badge(data),
        f'<p class="answer">{escape(first)}</p>',
        "".join(f"<p>{escape(sentence)}</p>" for sentence in rest),
        "<h2>Throughput and latency</h2>",
        '<div class="grid">' + _figure(charts, "throughput-latency", _points_note(data)),
        _figure(charts, "goodput", f"Requests a second that met {_slo_text(data)}.") + "</div>",
        _table(arm_table(data), "Throughput: median of blocks; latencies: all blocks, ms, from schedule."),
        _contrast_section(data),
        "<h2>Distributions</h2>",
        '<div class="grid">'
        + "".join(_figure(charts, name, "") for name in ("ttft-cdf", "itl-cdf", "total-cdf")),
        "</div>",
        _budget_section(data, charts),
        _timeline_section(data, charts, lane_names),
        _cost_section(data),
        "<h2>Machine and settings</h2>",
        "".join(f"<p>{escape(line)}</p>" for line in setting_lines(data)),
        _validity_section(data),
        f'<script type="application/json" id="manifest">{_embedded(data)}</script>',
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{''.join(sections)}</main><script>{SCRIPT}</script></body></html>"
    )


def _figure(charts: dict[str, str], name: str, note: str, css: str = "") -> str:
    if name not in charts:
        return ""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<figure class="{css}" id="{escape(name)}">{charts[name]}{caption}</figure>'


def _points_note(data: ReportData) -> str:
    if len(data.loads) > 1:
        return "One point a load. Right and down is better."
    return "One point a block. Right and down is better."


def _slo_text(data: ReportData) -> str:
    return data.slo.text() if data.slo else ""


def _contrast_section(data: ReportData) -> str:
    if not data.found:
        return ""
    note = (
        f"Ratios to {data.reference}, latencies from schedule, the same requests paired, "
        f"intervals over {data.num_blocks} block(s); those of an arm hold together at 95%. "
        "Below 1 is better for times."
    )
    same = f"{data.num_same[0]} of {data.num_same[1]} prompts got the same output from all arms."
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in contrast_sentences(data.found))
    return (
        f"<h2>Compared with {escape(str(data.reference))}</h2>{_table(contrast_table(data.found), note)}"
        f"<ul>{items}</ul><p>{same}</p>"
    )


def _budget_section(data: ReportData, charts: dict[str, str]) -> str:
    if "budget" not in charts:
        return ""
    shares = all(arm.budget.shares_clock for arm in data.arms if arm.budget)
    clock = (
        "Client and server share a clock, so the network is measured at both ends."
        if shares
        else "Client and server have clocks of their own: the network is the round trip of an idle server."
    )
    note = (
        f"Parts of the mean time to first token from schedule. {clock} The residual is what no term has "
        "stamps for."
    )
    return (
        "<h2>Where the first token waited</h2>"
        + _figure(charts, "budget", note, "narrow")
        + _table(budget_table(data), "Means in ms; the residual's share is the median over requests.")
    )


def _timeline_section(data: ReportData, charts: dict[str, str], names: Sequence[str]) -> str:
    if not names:
        return ""
    parts = [f'<h2>The batch over time</h2><figure class="narrow">{lane_legend()}</figure>']
    timed: list[ArmData] = [arm for arm in data.arms if arm.load == data.arms[0].load and arm.timeline]
    for arm, name in zip(timed, names, strict=True):
        line = arm.timeline
        assert line is not None
        note = (
            f"{arm.name}: {line.span_s:.1f} s in all; slots {line.live_share:.0%} live, "
            f"{line.dead_share:.0%} dead rows, {line.idle_share:.0%} empty; {line.between_steps_share:.0%} "
            "of the time no step was computed."
        )
        parts.append(_figure(charts, name, note, "wide"))
    parts.append(
        "<p>One lane a slot, the same time scale for all (long ones are cut), the first block of each.</p>"
    )
    return "".join(parts)


def _cost_section(data: ReportData) -> str:
    if not data.price.is_known:
        words = "Set PRICE_PER_HOUR_USD (of the machine) or PRICE_PER_TOKEN_USD to see dollars per million."
        return f"<h2>Cost</h2><p>{words}</p>"
    price = data.price
    of = (
        f"{price.per_hour_usd:g} USD an hour"
        if price.per_token_usd is None
        else f"{price.per_token_usd:g} USD a token"
    )
    lines = [[arm.name, arm.load, f"{arm.usd_per_million_tokens or 0:,.2f}"] for arm in data.arms]
    return "<h2>Cost</h2>" + _table((["arm", "load", "USD per million output tokens"], lines), f"At {of}.")


def _validity_badge(data: ReportData) -> str:
    level = str(data.manifest["validity"]["level"])
    return f'<p class="badge {level.lower()}">{level}</p>'


def _validity_section(data: ReportData) -> str:
    validity = data.manifest["validity"]
    reasons = [
        *(f"INVALID: {r}" for r in validity["invalid"]),
        *(f"caution: {r}" for r in validity["caution"]),
    ]
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons) or "<li>No doubts were found.</li>"
    return f"<h2>Validity</h2><ul>{items}</ul>"


def _table(table: Table, note: str) -> str:
    headers, lines = table
    head = "".join(f'<th><button type="button">{escape(name)}</button></th>' for name in headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<p class=note>{escape(note)}</p>"
    )


def _embedded(data: ReportData) -> str:
    """What the runs were, for whoever gets only this file."""
    kept = ("run_id", "arm", "model", "started_at", "seeds", "corpus", "schedule", "git", "packages", "path")
    runs = [{name: run.get(name) for name in kept} for run in data.manifest["runs"]]
    return json.dumps(runs).replace("<", "\\u003c")
