"""Every figure and word of a published verdict, computed again from the parquet with numpy alone.

Nothing of `harness.comparing` or of the table of metrics is used here but the text that is checked.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from harness.comparing.combine import compare_files
from harness.comparing.comparison import render_comparison

FILES = [Path("docs/measured") / f"{name}.parquet" for name in ("compare-lab-26m", "compare-default-closed")]
REFERENCE = "baseline"
HIGHER_IS_BETTER = {"output tok/s"}
LEADING = {"output tok/s", "TPOT p50"}
Blocks = dict[tuple[str, int], dict[int, dict[str, Any]]]


def read(file: Path) -> tuple[Blocks, dict[tuple[str, int], int], list[str]]:
    table = pq.read_table(file)
    raw = next(v for v in (table.schema.metadata or {}).values() if v[:1] == b"{" and b'"runs"' in v)
    manifest = json.loads(raw)
    blocks: Blocks = {}
    for row in table.to_pylist():
        blocks.setdefault((row["arm"], row["repeat"]), {})[row["schedule_index"]] = row
    started: dict[int, list[tuple[str, str]]] = {}
    for run in manifest["runs"]:
        started.setdefault(run["planned_repeats"][0], []).append((run["started_at"], run["arm"]))
    places = {
        (arm, block): place for block, runs in started.items() for place, (_, arm) in enumerate(sorted(runs))
    }
    return blocks, places, manifest["arms"]


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    stamps = [np.array(row["chunk_s"]) for row in rows]
    tokens = [np.array(row["chunk_tokens"]) for row in rows]
    scheduled = np.array([row["scheduled_s"] for row in rows])
    first, last = (np.array([s[at] for s in stamps]) for at in (0, -1))
    later = np.array([t[1:].sum() for t in tokens])
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = ((last - first) / later)[(later > 0) & (last > first)]
    gaps = [np.diff(s) for s in stamps if len(s) > 1]
    itl = np.concatenate([np.repeat(np.diff(s) / t[1:], t[1:]) for s, t in zip(stamps, tokens, strict=True)])
    span = max(row["finish_s"] for row in rows) - min(row["sent_s"] for row in rows)
    return {
        "output tok/s": sum(row["num_output_tokens"] for row in rows) / span,
        "time per request": math.exp(np.log(last - scheduled).mean()),
        "TTFT p50": float(np.percentile(first - scheduled, 50)),
        "TTFT p95": float(np.percentile(first - scheduled, 95)),
        "TPOT p50": float(np.percentile(tpot, 50)),
        "TPOT p95": float(np.percentile(tpot, 95)),
        "total p95": float(np.percentile(last - scheduled, 95)),
        "ITL p99": float(np.percentile(itl, 99)),
        "longest stall p95": float(np.percentile([g.max() for g in gaps], 95)),
    }


def log_ratios(blocks: Blocks, arms: list[str], reference: str) -> dict[str, np.ndarray]:
    """(arms, blocks) for each figure, the same requests paired."""
    numbers = sorted({block for _, block in blocks})
    found: dict[str, np.ndarray] = {}
    for a, arm in enumerate(arms):
        for b, number in enumerate(numbers):
            ours, theirs = blocks[arm, number], blocks[reference, number]
            common = [
                i for i in sorted(ours) if i in theirs and not ours[i]["error"] and not theirs[i]["error"]
            ]
            pair = figures([ours[i] for i in common]), figures([theirs[i] for i in common])
            for name, value in pair[0].items():
                found.setdefault(name, np.zeros((len(arms), len(numbers))))[a, b] = math.log(
                    value / pair[1][name]
                )
    return found


def without_places(values: np.ndarray, places: np.ndarray, reference: int) -> tuple[np.ndarray, np.ndarray]:
    """Least squares on indicators of arms and blocks and on the place, clipped at 3 median residuals."""
    num_arms, num_blocks = values.shape
    design = np.zeros((num_arms * num_blocks, num_arms + num_blocks + 1))
    for cell in range(num_arms * num_blocks):
        arm, block = divmod(cell, num_blocks)
        design[cell, [arm, num_arms + block]] = 1
    design[:, -1] = places.ravel()
    target = values.ravel().astype(float)
    for _ in range(15):
        fit = np.linalg.lstsq(design, target, rcond=None)[0]
        rest = target - design @ fit
        edge = 3 * np.median(np.abs(rest))
        target = target - rest + np.clip(rest, -edge, edge)
    own = design[:, -1] - design[:, :-1] @ np.linalg.lstsq(design[:, :-1], design[:, -1], rcond=None)[0]
    degrees = (num_arms - 1) * (num_blocks - 1) - 1
    variance = (rest**2).sum() / degrees / (own**2).sum()
    steps = places - places[reference]
    return values - fit[-1] * steps, variance * steps.mean(axis=1) ** 2


def t_of(probability: float, degrees: int) -> float:
    """By bisection of the integral of Student's density."""
    scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        x = np.linspace(0, middle, 20_001)
        y = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        below = 0.5 + float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())
        low, high = (middle, high) if below < probability else (low, middle)
    return low


def verdicts(file: Path, reference: str) -> dict[tuple[str, str], tuple[float, str]]:
    """Ratio and word of every arm and figure."""
    blocks, at, arms = read(file)
    num_blocks = len({block for _, block in blocks})
    assert num_blocks == 3
    places = np.array([[at[arm, block] for block in range(num_blocks)] for arm in arms])
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for name, values in log_ratios(blocks, arms, reference).items():
        adjusted, extra = without_places(values, places, arms.index(reference))
        share = 0.25 if name in LEADING else 0.5 / 7
        quantile = t_of(1 - 0.05 * share * 0.40 / 2, num_blocks - 1)
        for row, arm in enumerate(arms):
            logs = adjusted[row]
            middle = float(logs.mean())
            half = quantile * math.sqrt(logs.var(ddof=1) / num_blocks + extra[row])
            word = "can't tell"
            if abs(middle) + half < math.log(1.05):
                word = "equivalent"
            elif abs(middle) > half:
                word = "better" if (middle > 0) == (name in HIGHER_IS_BETTER) else "worse"
            found[arm, name] = math.exp(middle), word
    return found


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture(scope="module")
def text(file: Path) -> str:
    made = compare_files([file])
    return render_comparison(made.rows, made.manifest)


@pytest.fixture(scope="module")
def recomputed(file: Path) -> dict[tuple[str, str], tuple[float, str]]:
    return verdicts(file, REFERENCE)


def test_every_verdict_of_every_arm(
    file: Path, text: str, recomputed: dict[tuple[str, str], tuple[float, str]]
) -> None:
    told: dict[tuple[str, str], tuple[float | None, str]] = {}
    too_few: set[tuple[str, str]] = set()
    names = {name for _, name in recomputed}
    for line in text.splitlines():
        arm, _, words = line.partition(": ")
        if arm not in {a for a, _ in recomputed} or "in output tok/s" not in words:
            continue
        for clause in words.split("; "):
            if clause.startswith("too few samples for "):
                too_few |= {(arm, name) for name in names if name in clause}
                continue
            kind = next(k for k in ("better", "worse", "can't tell", "equivalent") if clause.startswith(k))
            for name in names:
                if (match := re.search(re.escape(name) + r" \(([\d.]+x)?", clause)) is not None:
                    told[arm, name] = (float(match[1][:-1]) if match[1] else None, kind)
    assert {key for key in recomputed if key[0] != REFERENCE} == set(told) | too_few
    blocks = read(file)[0]
    fewest = min(len(rows) for rows in blocks.values())
    assert all(fewest < (300 if "p99" in name else 60) for _, name in too_few)
    for key, (ratio, kind) in told.items():
        true_ratio, true_word = recomputed[key]
        assert kind == true_word, key
        if ratio is not None:
            assert ratio == pytest.approx(true_ratio, rel=0.05 if true_ratio < 0.1 else 1e-3, abs=0.0051), key


CLAUSES = (
    (r"([\d.]+)x the tokens", "output tok/s", "better"),
    (r"the whole answer ([\d.]+)x sooner", "time per request", "better"),
    (r"TTFT ([\d.]+)x sooner", "TTFT p50", "better"),
    (r"each token ([\d.]+)x later", "TPOT p50", "worse"),
    (r"ITL p99 ([\d.]+)x longer", "ITL p99", "worse"),
)


def test_the_first_sentence(
    file: Path, text: str, recomputed: dict[tuple[str, str], tuple[float, str]]
) -> None:
    sentence = text.split("\n\n")[1].splitlines()[0]
    assert sentence.startswith("continuous against baseline: ")
    gains, costs = sentence.removesuffix(".").partition(": ")[2].split("; ")
    clauses = {*gains.split(", "), *costs.split(", ")}
    for pattern, name, word in CLAUSES:
        match = re.search(pattern, gains if word == "better" else costs)
        if match is None:
            continue
        ratio, found = recomputed["continuous", name]
        assert found == word
        assert float(match[1]) == pytest.approx(max(ratio, 1 / ratio), rel=0.05)
        clauses.remove(match[0])
    assert not clauses, "every part of the sentence is checked"
    assert len(costs) > 0


def test_who_else_is_better(file: Path, text: str) -> None:
    """No arm wins while another is surely better in something; those are named, metric by metric."""
    against_first = verdicts(file, "continuous")
    small = re.findall(r"too few samples for ([^\n;]+)", text)
    too_few = set(small[0].split(", ")) if small else set()
    true = {
        (name, arm)
        for (arm, name), (_, word) in against_first.items()
        if word == "better" and name not in too_few
    }
    line = next(line for line in text.splitlines() if line.startswith("Others are surely better in "))
    listed = line.removeprefix("Others are surely better in ").partition(". ")[0]
    told = {
        (label.partition(" (")[0], arm)
        for label in listed.split("; ")
        for arm in label.partition(" (")[2].removesuffix(")").split(", ")
    }
    assert told == true
    assert "wins" not in text
