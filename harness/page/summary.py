"""The report in sentences and tables, for the page and for Markdown: what the first arm gives and costs, how
sure that is, and why. Every claim names its figure.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.comparing.combine import draws_text
from harness.comparing.comparison import verdict_lines
from harness.comparing.contrasts import Contrast
from harness.comparing.trade import decision_sentences
from harness.page.data import ArmData, ReportData
from harness.results.latency_budget import TERMS
from harness.results.metrics import compared_figures
from harness.results.table import MISSING, number, share


def verdict_sentences(data: ReportData) -> list[str]:
    """First the answer, then how sure it is, then why."""
    if data.decision is None or data.reference is None:
        return [_only_arm(arm) for arm in data.arms]
    told = decision_sentences(data.decision, data.reference, data.is_open, data.block_s)
    if data.num_blocks > 1:
        told.append(draws_text(data.manifest.runs))
    standing = {
        "VALID": "Nothing speaks against the runs.",
        "CAUTION": "There are reasons for caution (below).",
        "INVALID": "But the runs are INVALID (below), so this does not count.",
    }[data.manifest.validity.level]
    return [*told, standing, *why(data)]


def _only_arm(arm: ArmData) -> str:
    ttft_ms = arm.figures["ttft_p50_ms"]
    return (
        f"{arm.name} at {arm.load}: {number(arm.middle_tokens_per_s)} output tok/s, "
        f"TTFT p50 {number(ttft_ms)} ms from schedule."
    )


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
