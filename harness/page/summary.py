"""The report in sentences and tables, for the page and for Markdown: who wins, by how much, how sure that is,
and why. Every claim names its figure.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.comparing.contrasts import Contrast, decision, in_words, more_blocks, primary
from harness.page.data import ArmData, ReportData
from harness.results.latency_budget import TERMS
from harness.results.metrics import compared_figures
from harness.results.table import MISSING, number, share


def verdict_sentences(data: ReportData) -> list[str]:
    """First the answer, then how sure it is, then why."""
    if data.winner is None or data.runner_up is None:
        return [_only_arm(arm) for arm in data.arms]
    name, next_name = data.winner, data.runner_up
    metric = primary(data.is_open)
    found = decision(data.against_next, name, data.is_open)
    verdict = found.verdict if found else None
    if found is None or verdict is None:
        return [f"{name} comes first in {metric.label}, but too few answers stand behind it."]
    is_sure = verdict.word == "better"
    sentences = [
        f"{name} wins: {found.text()} the {metric.label} of the next, {next_name}."
        if is_sure
        else f"No winner is sure: {name} and {next_name} come first ({metric.label} {found.text()})."
    ]
    reference = decision(data.found, name, data.is_open)
    if reference is not None and reference.verdict is not None and data.reference != next_name:
        sentences.append(f"Against {data.reference} it is {reference.text()}.")
    sentences.append(_how_sure(data, found, is_sure))
    return [*sentences, *why(data)]


def _only_arm(arm: ArmData) -> str:
    ttft_ms = arm.figures["ttft_p50_ms"]
    return (
        f"{arm.name} at {arm.load}: {number(arm.middle_tokens_per_s)} output tok/s, "
        f"TTFT p50 {number(ttft_ms)} ms from schedule."
    )


def _how_sure(data: ReportData, found: Contrast, is_sure: bool) -> str:
    verdict = found.verdict
    assert verdict is not None
    blocks = f"{verdict.num_blocks} blocks, the same requests paired"
    level = data.manifest.validity.level
    standing = {
        "VALID": "nothing speaks against the runs",
        "CAUTION": "with reasons for caution (below)",
        "INVALID": "but the runs are INVALID (below), so this does not count",
    }[level]
    if is_sure:
        return f"How sure: the interval holds at {verdict.confidence:.1%} over {blocks}; {standing}."
    missing = more_blocks(data.against_next, data.is_open)
    ask = f"; {missing} more blocks would tell" if missing else ""
    return f"How sure: {verdict.text()} over {blocks}{ask}; {standing}."


def why(data: ReportData) -> list[str]:
    """What the step log and the budgets say about the winner and the reference."""
    sentences: list[str] = []
    shown = [
        arm for name in (data.winner, data.runner_up, data.reference) for arm in data.arms if arm.name == name
    ]
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
            f"Why: time of the batch's slots was spent so: {'; '.join(spent)} (live rows a step: {batches})."
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


def contrast_sentences(found: Sequence[Contrast]) -> list[str]:
    arms = list(dict.fromkeys(contrast.arm for contrast in found))
    return [f"{arm}: {in_words(found, arm)}." for arm in arms]


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


def setting_lines(data: ReportData) -> list[str]:
    run = data.manifest.runs[0]
    host, git = run.host, run.git
    gpus = ", ".join(host.gpu) or "none"
    dirty = " with local changes" if git.is_dirty else ""
    return [
        f"Model: {run.model}; {run.engine_text}.",
        f"Load: {', '.join(data.loads)}; {run.schedule.num_requests} requests a run, "
        f"{data.num_blocks} block(s), seed {run.settings.seed}, corpus {run.corpus.sha256[:12]}.",
        f"Machine: {host.cpu_model or 'unknown CPU'}, {host.physical_cores} cores"
        + (f", {host.memory_bytes / 2**30:.0f} GiB" if host.memory_bytes else "")
        + f", GPU {gpus}, governor {host.cpu_governor or 'unknown'}, {host.platform}.",
        f"Started {run.started_at}, commit {(git.sha or MISSING)[:12]}{dirty}.",
    ]
