"""Every figure and word of a published verdict, computed again from the parquet with numpy alone.

Nothing of `harness.comparing` or of the table of metrics is used here but the text that is checked.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from harness.comparing.combine import compare_files
from harness.comparing.comparison import render_comparison

NAMES = ("compare-lab-26m", "compare-default-closed", "compare-default-open")
FILES = [Path("docs/measured") / f"{name}.parquet" for name in NAMES]
REFERENCE = "baseline"
HIGHER_IS_BETTER = {"output tok/s"}
EARLY_LOOKS = (0.40, 0.10, 0.05)
"""Parts of the allowed error after the planned number of blocks, and after one and two more."""
MARGIN = math.log(1.05)
Blocks = dict[tuple[str, int], dict[int, dict[str, Any]]]


class Told(NamedTuple):
    """Of one arm and figure."""

    ratio: float
    interval: tuple[float, float]
    word: str
    missing: int
    """Blocks to measure next; 0 where there is a verdict."""


Verdicts = dict[tuple[str, str], Told]


class Read(NamedTuple):
    blocks: Blocks
    places: dict[tuple[str, int], int]
    arms: list[str]
    leading: set[str]
    planned: int


def read(file: Path) -> Read:
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
    plans = [run["schedule"] for run in manifest["runs"]]
    first = "total geomean" if plans[0].get("rate") else "output tok/s"
    planned = max(3, min(plan.get("num_blocks", 1) for plan in plans))
    return Read(blocks, places, manifest["arms"], {first, "TPOT p50"}, planned)


def figures(rows: list[dict[str, Any]], is_open: bool) -> dict[str, float]:
    stamps = [np.array(row["chunk_s"]) for row in rows]
    tokens = [np.array(row["chunk_tokens"]) for row in rows]
    scheduled = np.array([row["scheduled_s"] for row in rows])
    first, last = (np.array([s[at] for s in stamps]) for at in (0, -1))
    later = np.array([t[1:].sum() for t in tokens])
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = ((last - first) / later)[(later > 0) & (last > first)]
    gaps = [np.diff(s) for s in stamps if len(s) > 1]
    itl = np.concatenate([np.repeat(np.diff(s) / t[1:], t[1:]) for s, t in zip(stamps, tokens, strict=True)])
    if is_open:  # from the start of the schedule to its last arrival
        end = scheduled.max()
        span = end - min(row["scheduled_s"] - row["offset_s"] for row in rows)
        num_tokens = sum(t[s <= end].sum() for s, t in zip(stamps, tokens, strict=True))
    else:
        span = max(row["finish_s"] for row in rows) - min(row["sent_s"] for row in rows)
        num_tokens = sum(row["num_output_tokens"] for row in rows)
    return {
        "output tok/s": float(num_tokens / span),
        "total geomean": math.exp(np.log(last - scheduled).mean()),
        "TTFT p50": float(np.percentile(first - scheduled, 50)),
        "TTFT p95": float(np.percentile(first - scheduled, 95)),
        "TPOT p50": float(np.percentile(tpot, 50)),
        "TPOT p95": float(np.percentile(tpot, 95)),
        "total p95": float(np.percentile(last - scheduled, 95)),
        "ITL p99": float(np.percentile(itl, 99)),
        "longest stall p95": float(np.percentile([g.max() for g in gaps], 95)),
    }


def log_ratios(blocks: Blocks, arms: list[str], reference: str, is_open: bool) -> dict[str, np.ndarray]:
    """(arms, blocks) for each figure, the same requests paired."""
    numbers = sorted({block for _, block in blocks})
    found: dict[str, np.ndarray] = {}
    for a, arm in enumerate(arms):
        for b, number in enumerate(numbers):
            ours, theirs = blocks[arm, number], blocks[reference, number]
            common = [
                i for i in sorted(ours) if i in theirs and not ours[i]["error"] and not theirs[i]["error"]
            ]
            pair = [figures([part[i] for i in common], is_open) for part in (ours, theirs)]
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


def fifth_of_chi_square(degrees: int) -> float:
    """What a fifth of the sums of `degrees` squares stay below, by the integral of their density."""
    x = np.linspace(1e-6, 60, 600_001)
    y = x ** (degrees / 2 - 1) * np.exp(-x / 2) / (2 ** (degrees / 2) * math.gamma(degrees / 2))
    below = np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])
    return float(np.interp(0.2, below, x))


def missing_blocks(error: float, num_blocks: int, allowed: float, planned: int) -> int:
    """What finds a difference of 5% in nine of ten cases, but at most twice what there is."""
    spread = error * math.sqrt(num_blocks) * math.sqrt((num_blocks - 1) / fifth_of_chi_square(num_blocks - 1))
    for more in range(1, 2 * num_blocks):
        num = num_blocks + more
        trimmed = max(1, num // 10) if num >= 5 else 0
        part = EARLY_LOOKS[num - planned] if num - planned < len(EARLY_LOOKS) else 1 / 30
        degrees = num - 2 * trimmed - 1
        reach = t_of(1 - allowed * part / 2, degrees) + t_of(1 - (1 - 0.90) / 2, degrees)
        if reach * spread / math.sqrt(num) <= MARGIN:
            return more
    return 2 * num_blocks


@cache
def verdicts(file: Path, reference: str) -> Verdicts:
    """What is to be said of every arm and figure."""
    blocks, at, arms, leading, planned = read(file)
    num_blocks = len({block for _, block in blocks})
    assert num_blocks == planned in (3, 4), "none is left out, and nobody looked before"
    places = np.array([[at[arm, block] for block in range(num_blocks)] for arm in arms])
    found: Verdicts = {}
    for name, values in log_ratios(blocks, arms, reference, "total geomean" in leading).items():
        adjusted, extra = without_places(values, places, arms.index(reference))
        allowed = 0.05 * (0.25 if name in leading else 0.5 / 7)
        quantile = t_of(1 - allowed * EARLY_LOOKS[0] / 2, num_blocks - 1)
        for row, arm in enumerate(arms):
            if arm == reference:
                continue
            logs = adjusted[row]
            middle = float(logs.mean())
            error = math.sqrt(logs.var(ddof=1) / num_blocks + extra[row])
            half = quantile * error
            word = "can't tell"
            if abs(middle) + half < MARGIN:
                word = "equivalent"
            elif abs(middle) > half:
                word = "better" if (middle > 0) == (name in HIGHER_IS_BETTER) else "worse"
            missing = missing_blocks(error, num_blocks, allowed, planned) if word == "can't tell" else 0
            interval = math.exp(middle - half), math.exp(middle + half)
            found[arm, name] = Told(math.exp(middle), interval, word, missing)
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
def recomputed(file: Path) -> Verdicts:
    return verdicts(file, REFERENCE)


def test_every_verdict_of_every_arm(file: Path, text: str, recomputed: Verdicts) -> None:
    told: dict[tuple[str, str], tuple[float | None, str]] = {}
    asked: dict[tuple[str, str], str] = {}
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
                if (
                    match := re.search(re.escape(name) + r" \((?:([\d.]+)x|need ([^)]*))?", clause)
                ) is not None:
                    told[arm, name] = (float(match[1]) if match[1] else None, kind)
                    asked[arm, name] = match[2] or ""
    assert set(recomputed) == set(told) | too_few
    blocks = read(file).blocks
    num_blocks = len({block for _, block in blocks})
    fewest = min(len(rows) for rows in blocks.values())
    assert all(fewest < (300 if "p99" in name else 60) for _, name in too_few)
    for key, (ratio, kind) in told.items():
        true = recomputed[key]
        assert kind == true.word, key
        if ratio is not None:
            assert ratio == pytest.approx(true.ratio, rel=0.05 if true.ratio < 0.1 else 1e-3, abs=0.0051), key
        if true.missing:
            at_least = "at least " if true.missing == 2 * num_blocks else ""
            assert asked[key].startswith(f"{at_least}{true.missing} more block"), key


def test_every_ratio_has_its_interval(text: str, recomputed: Verdicts) -> None:
    table = text.partition("the 95% intervals of an arm allow for all its figures.")[2].strip().splitlines()
    names = [cell.strip() for cell in table[0].split("|")[2:-1]]
    shown = 0
    for line in table[2 : 2 + len({arm for arm, _ in recomputed})]:
        arm, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        for name, cell in zip(names, cells, strict=True):
            match = re.fullmatch(r"([\d.e+-]+)x \[([\d.e+-]+?)-([\d.]+(?:e\+\d+)?)\]", cell)
            if match is None:
                assert cell == "n too small" or cell.endswith("[too few blocks]")
                continue
            true = recomputed[arm, name]
            assert [float(match[i]) for i in (2, 3)] == pytest.approx(true.interval, rel=0.0051), (arm, name)
            shown += 1
    assert shown > 3


def test_the_advice_is_what_the_leading_figures_need(file: Path, text: str, recomputed: Verdicts) -> None:
    most = max(found.missing for (_, name), found in recomputed.items() if name in read(file).leading)
    if most:
        (line,) = [line for line in text.splitlines() if line.endswith("(--blocks).")]
        assert re.match(rf"It takes (at least )?{most} more block", line)
    else:
        assert "(--blocks)." not in text


CLAUSES = (
    (r"([\d.]+)x the tokens", "output tok/s", "better"),
    (r"the whole answer ([\d.]+)x sooner", "total geomean", "better"),
    (r"TTFT ([\d.]+)x sooner", "TTFT p50", "better"),
    (r"each token after the first ([\d.]+)x slower", "TPOT p50", "worse"),
    (r"ITL p99 ([\d.]+)x longer", "ITL p99", "worse"),
)


def test_the_first_sentence(text: str, recomputed: Verdicts) -> None:
    sentence = text.split("\n\n")[1].splitlines()[0]
    if sentence == "Can't tell continuous from baseline: no difference is sure.":
        shown = text.partition("continuous: ")[2].splitlines()[0]
        assert {
            f.word for (arm, name), f in recomputed.items() if arm == "continuous" and f"{name} (" in shown
        } == {"can't tell"}
        return
    assert sentence.startswith("continuous against baseline: ")
    gains, costs = sentence.removesuffix(".").partition(": ")[2].split("; ")
    clauses = {*gains.split(", "), *costs.split(", ")}
    for pattern, name, word in CLAUSES:
        match = re.search(pattern, gains if word == "better" else costs)
        if match is None:
            continue
        found = recomputed["continuous", name]
        assert found.word == word
        assert float(match[1]) == pytest.approx(max(found.ratio, 1 / found.ratio), rel=0.05)
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
        for (arm, name), found in against_first.items()
        if found.word == "better" and name not in too_few
    }
    start = "Surely better than continuous: "
    line = next((line for line in text.splitlines() if line.startswith(start)), start)
    listed = line.removeprefix(start).partition(". ")[0]
    told = {
        (label, arm)
        for part in listed.split("; ")
        if part
        for arms, _, label in [part.partition(" in ")]
        for arm in arms.split(", ")
    }
    assert told == true
    if true:
        assert "wins" not in text
