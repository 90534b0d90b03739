"""Capacity: the highest rate at which the limits hold, found anew in each block, so that it has an interval.

All arms of a block replay the same prompts with the same arrivals, stretched to each rate. So within a block
whether the limits hold depends on the rate alone, and ratios of two arms are paired. Each block starts its
search elsewhere: the stop of the search then is an error that blocks average out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.comparing.arms import arm_order
from harness.comparing.contrasts import ratio_text
from harness.comparing.intervals import FEWEST_BLOCKS, log_interval, middle_and_error
from harness.comparing.verdict import CONFIDENCE
from harness.plan.schedule import derive_seed
from harness.replay.arm_file import Arm
from harness.results.table import MISSING, render_table

FIRST_FACTOR, LATER_FACTOR = 2.0, 1.25
"""By how much rates grow until the limits do not hold: at first, and near the answer of another block."""
MAX_TRIED = 16
MOST_LOWERED = 8
"""Limits that do not hold at so many ever lower rates do not hold for an empty server."""
SATURATED_SHARE = 0.90
"""Below this share of the rate asked for, no more is tried."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A rate or a ratio, with its interval at 95% where there are enough blocks."""

    value: float
    interval: tuple[float, float] | None

    def text(self) -> str:
        return f"{self.value:.3g}" + (f" [{_range(self.interval)}]" if self.interval else "")


def next_load(
    met: Sequence[float], missed: Sequence[float], *, is_open: bool, closest: float = 0.05
) -> float | None:
    """Between the highest load that met the limits and the lowest above it; None when these are `closest`
    (or, of users, neighbours)."""
    low = max(met, default=0.0)
    above = [load for load in missed if load > low]
    if not met or not above:
        return None
    high = min(above)
    if is_open:
        return math.sqrt(low * high) if high / low > 1 + closest else None
    return float(round((low + high) / 2)) if high - low > 1 else None


def search(holds: Callable[[float], bool], start: float, factor: float, closest: float) -> float | None:
    """The rate in the middle of two that are `closest`, of which the limits hold at the lower alone.

    None where no such two were found in `MAX_TRIED` rates, or the limits do not hold for an empty server.
    """
    met: list[float] = []
    missed: list[float] = []
    rate: float | None = start
    while rate is not None and len(met) + len(missed) < MAX_TRIED:
        if not met and len(missed) > MOST_LOWERED:
            return None
        (met if holds(rate) else missed).append(rate)
        if not met:
            rate = min(missed) / factor
        elif not missed:
            rate = max(met) * factor
        else:
            rate = next_load(met, missed, is_open=True, closest=closest)
    if rate is not None:
        return None
    low = max(met)
    return math.sqrt(low * min(load for load in missed if load > low))


def is_saturated(rows: pd.DataFrame) -> bool:
    """Whether answers came clearly slower than requests: the queue then grows as long as the run lasts.

    What is left to answer after the last arrival is held against what the first fifth of the requests took,
    which met an empty server.
    """
    if rows["error"].notna().any() or len(rows) < 2:
        return True
    ordered = rows.sort_values("schedule_index")
    asked_s = float(ordered["scheduled_s"].iloc[-1] - ordered["scheduled_s"].iloc[0])
    left_s = float(ordered["finish_s"].max() - ordered["scheduled_s"].iloc[-1])
    unloaded_s = float(ordered["total_sched_ms"].head(max(1, len(rows) // 5)).max()) / 1e3
    return asked_s / (asked_s + max(0.0, left_s - unloaded_s)) < SATURATED_SHARE


def start_of_block(before: Sequence[float], first: float, seed: int, arm: str) -> tuple[float, float]:
    """Where the search of the next block starts, and the factor of its steps."""
    middle, factor = (float(np.median(before)), LATER_FACTOR) if before else (first, FIRST_FACTOR)
    offset = derive_seed(seed, f"capacity/{arm}") / (1 << 63) - 0.5
    return float(middle * factor**offset), factor


def find_capacities(
    arms: Sequence[Arm],
    num_blocks: int,
    from_rate: float,
    closest: float,
    seed: int,
    holds_at: Callable[[Arm, int], Callable[[float], bool]],
    found: dict[str, list[float | None]] | None = None,
) -> dict[str, list[float | None]]:
    """Every arm once in every block, in the order of a comparison.

    A search adds to `found` when it ends, so that an interruption leaves there what was measured before.
    """
    found = {} if found is None else found
    found.update({str(arm.name): [] for arm in arms})
    for block in range(num_blocks):
        for arm in arm_order(arms, block, seed):
            own = found[str(arm.name)]
            known = [rate for rate in own if rate is not None]
            start, factor = start_of_block(known, from_rate, derive_seed(seed, f"{block}"), str(arm.name))
            own.append(search(holds_at(arm, block), start, factor, closest))
    return found


def estimate(values: Sequence[float]) -> Estimate:
    """Of one positive value a block; geometric (trimmed) mean and Student's interval of the logarithms."""
    logs = np.log(np.asarray(values, dtype=float))
    if len(logs) < FEWEST_BLOCKS:
        return Estimate(float(np.exp(logs.mean())), None)
    low, high = log_interval(logs, CONFIDENCE)
    return Estimate(float(np.exp(middle_and_error(logs)[0])), (float(np.exp(low)), float(np.exp(high))))


@dataclass(frozen=True, slots=True)
class Capacities:
    """Requests a second of each arm in each block; None where a search found no end."""

    of_block: dict[str, list[float | None]]
    reference: str
    limits: str
    closest: float
    was_interrupted: bool = False
    """Some arms may have fewer blocks, or none."""

    def capacity(self, arm: str) -> Estimate | None:
        values = [value for value in self.of_block[arm] if value is not None]
        return estimate(values) if values and len(values) == len(self.of_block[arm]) else None

    def ratio(self, arm: str) -> Estimate | None:
        """To the reference, block by block."""
        pairs = list(zip(self.of_block[arm], self.of_block[self.reference], strict=False))
        ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        return estimate(ratios) if ratios and len(ratios) == len(pairs) else None

    def table(self) -> str:
        lines: list[list[str]] = []
        for arm in self.of_block:
            own, ratio = self.capacity(arm), self.ratio(arm) if arm != self.reference else None
            told = own.text() if own else "no end found" if self.of_block[arm] else MISSING
            against = MISSING if ratio is None else _ratio(ratio)
            lines.append([arm, told, against, str(len(self.of_block[arm]))])
        return render_table(["arm", "capacity (requests/s)", f"ratio to {self.reference}", "blocks"], lines)

    def text(self) -> str:
        return "\n".join(
            [
                self.table(),
                f"Capacity: the highest rate at which {self.limits} holds. Each search stops when two rates "
                f"are within {self.closest:.0%}; each interval holds at {CONFIDENCE:.0%}, over blocks of "
                f"other arrivals. Below {FEWEST_BLOCKS} blocks there is none.",
                *(["Interrupted: only searches that had ended count."] if self.was_interrupted else []),
            ]
        )

    def facts(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "limits": self.limits,
            "closest": self.closest,
            "confidence": CONFIDENCE,
            "reference": self.reference,
            "interrupted": self.was_interrupted,
            "arms": {
                arm: {
                    "blocks": list(self.of_block[arm]),
                    "requests_per_s": _facts(self.capacity(arm)),
                    "ratio": _facts(self.ratio(arm)),
                }
                for arm in self.of_block
            },
        }


def _facts(found: Estimate | None) -> dict[str, object] | None:
    return None if found is None else {"value": found.value, "interval": found.interval}


def _ratio(found: Estimate) -> str:
    return ratio_text(found.value) + (f" [{_range(found.interval)}]" if found.interval else "")


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3g}-{interval[1]:.3g}"
