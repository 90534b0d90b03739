"""The report in sentences and tables, for the page and for Markdown: what the first arm gives and costs, how
sure that is, and why. Every claim names its figure.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from harness.comparing.combine import unranked_text
from harness.comparing.comparison import answer_sentences as comparison_sentences
from harness.comparing.comparison import padding_lines, unlike_work
from harness.page.data import ArmData, ReportData
from harness.results.latency_budget import TERMS
from harness.results.lengths import length_table
from harness.results.metrics import METRICS, OUTPUT_TOKENS, Figure, compared_figures
from harness.results.server_lines import server_lines
from harness.results.steady import FIGURES as STEADY_FIGURES
from harness.results.table import MISSING, number, render_table, share
from harness.settings import HarnessSettings, spelled

TOKENS = Figure(OUTPUT_TOKENS).key


def title(data: ReportData) -> str:
    listed = ", ".join(data.names) if len(data.names) < 7 else f"{len(data.names)} arms"
    return f"{listed} on {data.manifest.runs[0].model}"


def question(data: ReportData) -> str:
    run, names = data.manifest.runs[0], data.names
    model = "the null backend" if run.service and run.service.backend == "null" else run.model
    load = f" at {data.loads[0]}" if len(data.loads) == 1 else f" over {len(data.loads)} loads"
    if len(names) == 1:
        return f"How does {names[0]} serve {model}{load}?"
    if len(names) > 4:
        return f"Which of {len(names)} arms serves {model} best{load}?"
    return f"What serves {model} best{load}: {', '.join(names[:-1])} or {names[-1]}?"


def verdict_sentences(data: ReportData) -> list[str]:
    """First the answer, then how sure it is, then why."""
    return [*answer_sentences(data), *why(data)]


def answer_sentences(data: ReportData) -> list[str]:
    if data.decision and data.reference:
        unsteady = [arm.name for arm in data.arms if arm.steady is None]
        return comparison_sentences(data.manifest, data.decision, unsteady)
    if unranked := unranked_text(data.manifest.runs):
        return [unranked, *(_only_arm(arm) for arm in data.arms)]
    if len(data.names) > 1 and len(data.loads) > 1:
        return [_at_load(data, load) for load in data.loads] + [
            "How sure: a page of several loads has no intervals; the page of each file has them."
        ]
    return [_only_arm(arm) for arm in data.arms]


def _only_arm(arm: ArmData) -> str:
    return (
        f"{arm.name} at {arm.load}: {number(arm.figures[TOKENS])} output tok/s, "
        f"TTFT p50 {number(arm.figures['ttft_p50_ms'])} ms from schedule."
    )


def _at_load(data: ReportData, load: str) -> str:
    def ranked(key: str, sign: int) -> str:
        told = [(arm.figures[key], arm.name) for arm in data.arms if arm.load == load]
        best_first = sorted(told, key=lambda pair: math.inf if pair[0] is None else sign * pair[0])
        return ", ".join(f"{name} {number(value, 0)}" for value, name in best_first)

    return (
        f"At {load}: output tok/s {ranked(TOKENS, -1)}; TTFT p50 from schedule, ms: "
        f"{ranked('ttft_p50_ms', 1)}."
    )


def why(data: ReportData) -> list[str]:
    """What steps, slots and budgets say about each arm of a comparison."""
    sentences: list[str] = []
    shown = data.arms if data.decision else []
    batches = [
        f"{arm.name} {number(arm.mean_batch_size, 1)}"
        + (f" and {share(arm.dead_row_share)} dead rows" if arm.dead_row_share else "")
        for arm in shown
        if arm.mean_batch_size is not None
    ]
    if batches:
        sentences.append(f"Answers that grew in one step, on average: {', '.join(batches)}.")
    spent = [
        f"{arm.name} {arm.timeline.live_share:.0%} live, {arm.timeline.dead_share:.0%} dead rows, "
        f"{arm.timeline.idle_share:.0%} empty"
        for arm in shown
        if arm.timeline
    ]
    if spent:
        sentences.append(f"How the batch's slots were used: {'; '.join(spent)}.")
    waits = [f"{arm.name} {_largest_term(arm)}" for arm in shown if arm.budget]
    if waits:
        sentences.append(f"Where the first token waited longest, on average: {'; '.join(waits)}.")
    return sentences


def _largest_term(arm: ArmData) -> str:
    assert arm.budget is not None
    means = arm.budget.means()
    name, longest = max(means.items(), key=lambda term: term[1])
    words = {**dict(TERMS), "residual_ms": "unaccounted"}[name]
    return f"{words} ({longest:,.0f} of {sum(means.values()):,.0f} ms)"


Table = tuple[list[str], list[list[str]]]
"""Headers, and lines."""


def _table(lines: Sequence[Mapping[str, str]]) -> Table:
    """Every line has the same keys: the headers."""
    return list(lines[0]) if lines else [], [list(line.values()) for line in lines]


def arm_table(data: ReportData) -> Table:
    lines: list[dict[str, str]] = []
    for arm in data.arms:
        line = {"arm": arm.name, "load": arm.load}
        line |= {figure.label: figure.text(arm.figures[figure.key]) for figure in compared_figures()}
        line |= {"mean batch": number(arm.mean_batch_size, 2), "dead rows": share(arm.dead_row_share)}
        if data.slo:
            line |= {"goodput/s": number(arm.goodput_per_s, 2), "met SLO": share(arm.goodput_share)}
        for limit in data.run_limits:
            line[limit.text()] = "met" if limit.is_met_by(arm.figures[limit.figure.key]) else "missed"
        lines.append(line | {"USD per 1M tokens": number(arm.usd_per_million_tokens, 2)})
    return _table(lines)


def length_lines(data: ReportData) -> list[str]:
    """Where the model ends answers: their lengths, and whether the arms did like work."""
    lengths = {f"{arm.name}, {arm.load}": arm.lengths for arm in data.arms if arm.lengths is not None}
    if not lengths:
        return []
    num_unlike = data.num_same[1] - data.num_same[0]
    doubts = [f"- caution: {unlike_work(num_unlike)}"] if num_unlike else []
    return [render_table(*length_table(lengths)), *doubts]


def figure_table(data: ReportData) -> Table:
    """Every figure of the table of metrics; a column an arm."""
    lines: list[list[str]] = []
    for metric in METRICS:
        for figure in metric.figures:
            told = (figure.text(arm.figures[figure.key]) for arm in data.arms)
            lines.append([figure.label + " (ms)" * (metric.unit == "ms"), *told])
    return ["figure", *(arm_at(data, arm) for arm in data.arms)], lines


def arm_at(data: ReportData, arm: ArmData) -> str:
    """With its load, where there are several."""
    return arm.name if len(data.loads) == 1 else f"{arm.name}, {arm.load}"


def as_json(data: ReportData) -> dict[str, Any]:
    """The same numbers for programs: `lab report --json`, the page, and the API of `lab results`."""
    plain = ("load", "figures", "mean_batch_size", "dead_row_share", "goodput_per_s",
             "usd_per_million_tokens", "num_failed")  # fmt: skip
    return {
        "question": question(data),
        "answer": verdict_sentences(data),
        "validity": data.manifest.validity.as_dict(),
        "arms": [
            {
                "arm": arm.name,
                "intervals": {key: found for key, found in arm.intervals.items() if found is not None},
                "steady_window": arm.steady and arm.steady.as_dict(),
                **{name: getattr(arm, name) for name in plain},
            }
            for arm in data.arms
        ],
        "ratios": [
            {
                "arm": contrast.arm,
                "reference": contrast.reference,
                "figure": contrast.figure.key,
                "verdict": contrast.word,
                **{name: getattr(contrast.verdict, name, None) for name in ("ratio", "interval")},
            }
            for contrast in data.found
        ],
        "command": command(data),
        "settings": setting_lines(data),
    }


def run_facts(data: ReportData) -> list[dict[str, Any]]:
    """What the page keeps of the manifest of each run, for programs."""
    kept = {"run_id", "arm", "model", "started_at", "seeds", "corpus", "schedule", "git", "packages", "path"}
    return [run.model_dump(mode="json", include=kept, exclude_unset=True) for run in data.manifest.runs]


def command(data: ReportData) -> str:
    """What measures this again: the settings that are not the default, and the model that was served."""
    runs = data.manifest.runs
    run, own = runs[0], [(m.own_arm or m.arm).split() for m in runs]
    words = ["lab", "bench", "--variant", run.variant]
    if len(data.names) > 1:
        arms = dict.fromkeys("@".join(filter(None, (arm[0], ",".join(arm[1:])))) for arm in own)
        words = f"lab compare --pad on --blocks {data.manifest.num_blocks} --variants".split() + list(arms)
    given = run.settings.model_dump(mode="json")
    if run.service:
        given |= {"backend": run.service.backend, "model": run.model}
    given |= {"requests": run.schedule.num_requests, "variant": None, "out": None, "start_at": None}
    for name, field in HarnessSettings.model_fields.items():
        value = given.get(name)
        if value is not None and (value != field.default or name == "requests"):
            words += [f"--{name.replace('_', '-')}", spelled(value)]
    # Settings that all services had from their environment go before it, as NAME=value.
    of_runs = [
        {name: m.service.settings.get(name) for name in m.service.given} if m.service else {} for m in runs
    ]
    told = {*HarnessSettings.model_fields, "pad_finished"}
    told |= {setting.partition("=")[0].lower() for arm in own for setting in arm}
    shared = [
        f"{name.upper()}={spelled(value)}"
        for name, value in of_runs[0].items()
        if name not in told and value is not None and all(of.get(name) == value for of in of_runs)
    ]
    return shlex.join([*shared, *words])


def num_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def budget_table(data: ReportData) -> Table:
    labels = {name: words.partition(" (")[0].partition(",")[0] for name, words in TERMS}
    lines: list[dict[str, str]] = []
    for arm in data.arms:
        if (budget := arm.budget) is not None:
            line = {"mean ms": arm.name}
            line |= {labels.get(name, "residual"): number(ms, 2) for name, ms in budget.means().items()}
            line["TTFT from schedule"] = number(float(budget.terms["ttft_sched_ms"].mean()), 1)
            lines.append(line | {"median |residual| / TTFT": share(budget.residual_share)})
    return _table(lines)


def steady_table(data: ReportData) -> Table:
    """The part of the replays in which load was as asked."""
    latencies = [f"{figure.label} (ms)" for figure in STEADY_FIGURES]
    lines: list[list[str]] = []
    for arm in data.arms:
        cells = [MISSING] * (3 + len(latencies))
        if (of := arm.steady) is not None:
            cells = [share(of.share), str(of.num_requests), number(of.output_tokens_per_s, 1)]
            cells += [f.text(value) for f, value in zip(STEADY_FIGURES, of.latencies, strict=True)]
        lines.append([arm.name, arm.load, *cells])
    return ["arm", "load", "share of the time", "answers", "output tok/s", *latencies], lines


def setting_lines(data: ReportData) -> list[str]:
    run = data.manifest.runs[0]
    host, git = run.host, run.git
    gpus = ", ".join(host.gpu) or "none"
    dirty = " with local changes" if git.is_dirty else ""
    started = f"{datetime.fromisoformat(run.started_at):%d %b %Y, %H:%M %Z}".lstrip("0")
    return [
        f"Model: {run.model}; {run.engine_text}.",
        f"Load: {', '.join(data.loads)}; {run.schedule.num_requests} requests a run, "
        f"{num_of(data.manifest.num_blocks, 'block')}, seed {run.settings.seed}, "
        f"corpus {run.corpus.sha256[:12]}.",
        f"Machine: {host.cpu_model or 'unknown CPU'}, {host.physical_cores} cores"
        + (f", {host.memory_bytes / 2**30:.0f} GiB" if host.memory_bytes else "")
        + f", GPU {gpus}, governor {host.cpu_governor or 'unknown'}, {host.platform}.",
        f"Started {started}, commit {(git.sha or MISSING)[:12]}{dirty}.",
        *(f"{label.capitalize()}: {told}." for label, told in server_lines(run)),
        *padding_lines(data.manifest),
    ]
