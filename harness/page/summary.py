"""The report in sentences and tables, for the page and for Markdown: what the first arm gives and costs, how
sure that is, and why. Every claim names its figure.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from harness.comparing.combine import draws_text
from harness.comparing.comparison import padding_lines, unlike_work, verdict_lines
from harness.comparing.contrasts import Contrast
from harness.comparing.trade import decision_sentences
from harness.page.data import ArmData, ReportData
from harness.results.latency_budget import TERMS
from harness.results.lengths import length_table
from harness.results.metrics import METRICS, compared_figures
from harness.results.server_lines import server_lines
from harness.results.steady import FIGURES as STEADY_FIGURES
from harness.results.table import MISSING, number, render_table, share
from harness.settings import HarnessSettings, spelled


def question(data: ReportData) -> str:
    model = data.manifest.runs[0].model
    load = f" at {data.loads[0]}" if len(data.loads) == 1 else f" over {len(data.loads)} loads"
    names = data.names
    if len(names) == 1:
        return f"How does {names[0]} serve {model}{load}?"
    listed = ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) < 5 else f"{len(names)} arms"
    return (
        f"What serves {model} best{load}: {listed}?"
        if len(names) < 5
        else f"Which of {listed} serves {model} best{load}?"
    )


def verdict_sentences(data: ReportData) -> list[str]:
    """First the answer, then how sure it is, then why."""
    return [*answer_sentences(data), *why(data)]


def answer_sentences(data: ReportData) -> list[str]:
    if data.decision is None or data.reference is None:
        if len(data.names) > 1 and len(data.loads) > 1:
            return [_at_load(data, load) for load in data.loads] + [
                "How sure: a page of several loads has no intervals; the page of each file has them."
            ]
        return [_only_arm(arm) for arm in data.arms]
    told = decision_sentences(data.decision, data.reference, data.is_open, data.block_s)
    if data.num_blocks > 1:
        told.append(draws_text(data.manifest.runs))
    if reasons := data.manifest.validity.invalid:
        sure = [sentence for sentence in told if not sentence.startswith("How sure")]
        first = f"Nothing is decided: the runs are INVALID ({reasons[0]}), so this does not count."
        return [first, "Mend that, and measure again. What came out all the same:", *sure]
    standing = {
        "VALID": "Nothing speaks against the runs.",
        "CAUTION": "There are reasons for caution (below).",
    }[data.manifest.validity.level]
    return [*told, standing]


def _only_arm(arm: ArmData) -> str:
    ttft_ms = arm.figures["ttft_p50_ms"]
    return (
        f"{arm.name} at {arm.load}: {number(arm.middle_tokens_per_s)} output tok/s, "
        f"TTFT p50 {number(ttft_ms)} ms from schedule."
    )


def _at_load(data: ReportData, load: str) -> str:
    arms = [arm for arm in data.arms if arm.load == load]
    by_rate = sorted(arms, key=lambda arm: -arm.middle_tokens_per_s)
    by_ttft = sorted(arms, key=lambda arm: arm.figures["ttft_p50_ms"] or float("inf"))
    rates = ", ".join(f"{arm.name} {number(arm.middle_tokens_per_s, 0)}" for arm in by_rate)
    times = ", ".join(f"{arm.name} {number(arm.figures['ttft_p50_ms'], 0)}" for arm in by_ttft)
    return f"At {load}: output tok/s {rates}; TTFT p50 from schedule, ms: {times}."


def why(data: ReportData) -> list[str]:
    """What the step log and the budgets say about the first two arms and the reference."""
    sentences: list[str] = []
    made = data.decision
    named = (made.first, made.second, data.reference) if made else ()
    shown = [arm for name in named for arm in data.arms if arm.name == name]
    shown = list({arm.name: arm for arm in shown}.values())
    spent = [
        f"{arm.name} {arm.timeline.live_share:.0%} live, {arm.timeline.dead_share:.0%} dead rows, "
        f"{arm.timeline.idle_share:.0%} empty"
        for arm in shown
        if arm.timeline
    ]
    if spent:
        batches = ", ".join(f"{arm.name} {number(arm.mean_batch_size, 1)}" for arm in shown)
        sentences.append(
            f"Time of the batch's slots was spent so: {'; '.join(spent)} (live rows a step: {batches})."
        )
    waits = [f"{arm.name} {_largest_term(arm)}" for arm in shown if arm.budget]
    if waits:
        sentences.append(f"Where the first token waited longest: {'; '.join(waits)}.")
    return sentences


def _largest_term(arm: ArmData) -> str:
    assert arm.budget is not None
    means = arm.budget.means()
    total = sum(means.values())
    name = max(means, key=lambda term: means[term])
    words = {**dict(TERMS), "residual_ms": "unaccounted"}[name]
    return f"{words} ({means[name]:,.0f} of {total:,.0f} ms)"


def arm_table(data: ReportData) -> tuple[list[str], list[list[str]]]:
    figures = compared_figures()
    headers = ["arm", "load", *(figure.label for figure in figures), "mean batch", "dead rows"]
    if data.slo is not None:
        headers += ["goodput/s", "met SLO"]
    headers += [limit.text() for limit in data.run_limits]
    headers.append("USD per 1M tokens")
    lines: list[list[str]] = []
    for arm in data.arms:
        cells = [arm.name, arm.load, *(figure.text(arm.figures[figure.key]) for figure in figures)]
        cells += [number(arm.mean_batch_size, 2), share(arm.dead_row_share)]
        if data.slo is not None:
            cells += [number(arm.goodput_per_s, 2), share(arm.goodput_share)]
        cells += [
            "met" if limit.is_met_by(arm.figures[limit.figure.key]) else "missed" for limit in data.run_limits
        ]
        cells.append(number(arm.usd_per_million_tokens, 2))
        lines.append(cells)
    return headers, lines


def length_lines(data: ReportData) -> list[str]:
    """Where the model ends answers: their lengths, and whether the arms did like work."""
    lengths = {f"{arm.name}, {arm.load}": arm.lengths for arm in data.arms if arm.lengths is not None}
    if not lengths:
        return []
    num_same, num_planned = data.num_same
    lines = [render_table(*length_table(lengths))]
    if num_same < num_planned:
        lines.append(f"- caution: {unlike_work(num_planned - num_same)}")
    return lines


def arm_at(data: ReportData, arm: ArmData) -> str:
    """With its load, where there are several."""
    return arm.name if len(data.loads) == 1 else f"{arm.name}, {arm.load}"


def figure_table(data: ReportData) -> tuple[list[str], list[list[str]]]:
    """Every figure of the table of metrics; a column an arm, and what each figure means as the last one."""
    headers = [
        "figure",
        *(arm_at(data, arm) for arm in data.arms),
    ]
    lines = [
        [
            f"{f.label} (ms)" if m.unit == "ms" else f.label,
            *(f.text(arm.figures[f.key]) for arm in data.arms),
            m.description,
        ]
        for m in METRICS
        for f in m.figures
    ]
    return headers, lines


def as_json(data: ReportData) -> dict[str, Any]:
    """The same numbers for programs: `lab report --json`, the page, and the API of `lab results`."""
    return {
        "question": question(data),
        "answer": verdict_sentences(data),
        "validity": data.manifest.validity.as_dict(),
        "arms": [
            {
                "arm": arm.name,
                "load": arm.load,
                "figures": arm.figures,
                "intervals": {key: found for key, found in arm.intervals.items() if found is not None},
                "steady_window": arm.steady and arm.steady.as_dict(),
                "mean_batch_size": arm.mean_batch_size,
                "dead_row_share": arm.dead_row_share,
                "goodput_per_s": arm.goodput_per_s,
                "usd_per_million_tokens": arm.usd_per_million_tokens,
                "num_failed": arm.num_failed,
            }
            for arm in data.arms
        ],
        "ratios": [
            {
                "arm": c.arm,
                "reference": c.reference,
                "figure": c.figure.key,
                "verdict": c.word,
                "ratio": c.verdict and c.verdict.ratio,
                "interval": c.verdict and c.verdict.interval,
            }
            for c in data.found
        ],
        "command": command(data),
        "settings": setting_lines(data),
    }


def command(data: ReportData) -> str:
    """What measures this again: the settings that are not the default, and the model that was served."""
    run = data.manifest.runs[0]
    words = ["lab", "bench", "--variant", run.variant]
    if len(data.names) > 1:
        arms = [(m.own_arm or m.arm).split() for m in data.manifest.runs]
        spelled_arms = dict.fromkeys("@".join(filter(None, (arm[0], ",".join(arm[1:])))) for arm in arms)
        words = [
            "lab",
            "compare",
            "--pad",
            "on",
            "--blocks",
            str(data.num_blocks),
            "--variants",
            *spelled_arms,
        ]
    given = run.settings.model_dump(mode="json")
    if run.service:
        given |= {"backend": run.service.backend, "model": run.model}
    given |= {"requests": run.schedule.num_requests, "variant": None, "out": None, "start_at": None}
    for name, field in HarnessSettings.model_fields.items():
        value = given.get(name)
        if value is not None and (value != field.default or name == "requests"):
            words += [f"--{name.replace('_', '-')}", spelled(value)]
    return shlex.join([*_given_to_all(data), *words])


def _given_to_all(data: ReportData) -> list[str]:
    """Settings that all services had from their environment, as NAME=value."""
    of_arms = [
        {name: run.service.settings.get(name) for name in run.service.given} if run.service else {}
        for run in data.manifest.runs
    ]
    own = {
        setting.partition("=")[0]
        for run in data.manifest.runs
        for setting in (run.own_arm or run.arm).split()
    }
    kept = {name: value for name, value in of_arms[0].items() if all(of.get(name) == value for of in of_arms)}
    told = {*HarnessSettings.model_fields, "pad_finished", *map(str.lower, own)}
    return [
        f"{name.upper()}={spelled(value)}"
        for name, value in kept.items()
        if name not in told and value is not None
    ]


def human_time(iso: str) -> str:
    """As 21 Nov 2026, 18:39 UTC."""
    return f"{datetime.fromisoformat(iso):%d %b %Y, %H:%M %Z}".lstrip("0")


def num_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def contrast_sentences(found: Sequence[Contrast]) -> list[str]:
    return [f"{line}." for line in verdict_lines(found)]


def budget_table(data: ReportData) -> tuple[list[str], list[list[str]]]:
    names = [*(name for name, _ in TERMS), "residual_ms"]
    labels = [words.partition(" (")[0].partition(",")[0] for _, words in TERMS]
    headers = ["mean ms", *labels, "residual", "TTFT from schedule", "median |residual| / TTFT"]
    lines: list[list[str]] = []
    for arm in data.arms:
        if arm.budget is None:
            continue
        means = arm.budget.means()
        mean_ttft = float(arm.budget.terms["ttft_sched_ms"].mean())
        lines.append(
            [
                arm.name,
                *(number(means[n], 2) for n in names),
                number(mean_ttft, 1),
                share(arm.budget.residual_share),
            ]
        )
    return headers, lines


def steady_table(data: ReportData) -> tuple[list[str], list[list[str]]]:
    """The part of the replays in which load was as asked."""
    latencies = [f"{figure.label} (ms)" for figure in STEADY_FIGURES]
    lines: list[list[str]] = []
    for arm in data.arms:
        cells = [MISSING] * (3 + len(latencies))
        if (found := arm.steady) is not None:
            cells = [share(found.share), str(found.num_requests), number(found.output_tokens_per_s, 1)]
            pairs = zip(STEADY_FIGURES, found.latencies, strict=True)
            cells += [figure.text(value) for figure, value in pairs]
        lines.append([arm.name, arm.load, *cells])
    return ["arm", "load", "share of the time", "answers", "output tok/s", *latencies], lines


def setting_lines(data: ReportData) -> list[str]:
    run = data.manifest.runs[0]
    host, git = run.host, run.git
    gpus = ", ".join(host.gpu) or "none"
    dirty = " with local changes" if git.is_dirty else ""
    return [
        f"Model: {run.model}; {run.engine_text}.",
        f"Load: {', '.join(data.loads)}; {run.schedule.num_requests} requests a run, "
        f"{num_of(data.num_blocks, 'block')}, seed {run.settings.seed}, corpus {run.corpus.sha256[:12]}.",
        f"Machine: {host.cpu_model or 'unknown CPU'}, {host.physical_cores} cores"
        + (f", {host.memory_bytes / 2**30:.0f} GiB" if host.memory_bytes else "")
        + f", GPU {gpus}, governor {host.cpu_governor or 'unknown'}, {host.platform}.",
        f"Started {human_time(run.started_at)}, commit {(git.sha or MISSING)[:12]}{dirty}.",
        *(f"{label.capitalize()}: {told}." for label, told in server_lines(run)),
        *padding_lines(data.manifest),
    ]
