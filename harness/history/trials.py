"""How often change points are right on made-up histories: the tables of docs/nightly.md.

Each history is planted with one step at a random night, and judged once without it. `memory` is the
correlation of one night's noise with the next: the test assumes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.history.change_points import MIN_NIGHTS, ChangePoint, change_points, jumps
from harness.results.formulas import Floats
from harness.results.table import render_table, share

NOISES = (0.01, 0.015, 0.02, 0.03)
RATIO_NOISES = (0.005, 0.0075, 0.01, 0.015)
MEMORIES = (0.0, 0.3)
TOLERANCE = 1
"""Nights by which a mark may miss the planted one."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of histories."""

    false_alarm: float
    """Pure noise, and a mark."""
    found: float
    """The planted step is marked within `TOLERANCE` nights."""
    exact: float
    extra: float
    """A mark elsewhere, beside the planted step."""


def trial_rates(
    num_histories: int, num_nights: int, step: float, noise: float, memory: float, seed: int = 0
) -> Rates:
    """Of absolute figures, whose noise remembers the night before."""

    def draw(generator: np.random.Generator) -> Floats:
        return np.exp(noise * _remembering(generator.normal(size=num_nights), memory))

    def plant(values: Floats, night: int) -> Floats:
        return np.where(np.arange(len(values)) < night, values, values * (1 - step))

    return _rates(num_histories, num_nights, seed, draw, plant, change_points)


def ratio_rates(num_histories: int, num_nights: int, step: float, noise: float, seed: int = 0) -> Rates:
    """The same of a chain: `noise` is that of a night's ratio, whatever the machine does between nights."""

    def draw(generator: np.random.Generator) -> Floats:
        return np.concatenate(([0.0], noise * generator.normal(size=num_nights)))

    def plant(steps: Floats, night: int) -> Floats:
        return np.where(np.arange(len(steps)) == night, steps + np.log1p(-step), steps)

    return _rates(num_histories, num_nights, seed, draw, plant, lambda steps: jumps(np.exp(np.cumsum(steps))))


def _rates(
    num_histories: int,
    num_nights: int,
    seed: int,
    draw: Callable[[np.random.Generator], Floats],
    plant: Callable[[Floats, int], Floats],
    marks_of: Callable[[Floats], Sequence[ChangePoint]],
) -> Rates:
    """How often marks stand in histories as drawn, and where in the same ones with a step planted."""
    generator = np.random.default_rng(seed)
    counts = np.zeros(4)
    for _ in range(num_histories):
        drawn = draw(generator)
        night = int(generator.integers(2 * MIN_NIGHTS, num_nights - 2 * MIN_NIGHTS + 1))
        away = [abs(mark.index - night) for mark in marks_of(plant(drawn, night))]
        counts += (
            bool(marks_of(drawn)),
            min(away, default=9) <= TOLERANCE,
            0 in away,
            max(away, default=0) > TOLERANCE,
        )
    return Rates(*map(float, counts / num_histories))


def trials_text(num_histories: int, num_nights: int, step: float) -> str:
    lines = []
    for memory in MEMORIES:
        for noise in NOISES:
            rates = trial_rates(num_histories, num_nights, step, noise, memory)
            told = (rates.false_alarm, rates.found, rates.exact, rates.extra)
            lines.append([f"{noise:.1%}", f"{memory:g}", *map(share, told)])
    within = f"marked within {TOLERANCE} night"
    headers = ["noise a night", "memory", "pure noise marked", within, "at its night", "a mark elsewhere"]
    chain_lines = []
    for noise in RATIO_NOISES:
        rates = ratio_rates(num_histories, num_nights, step, noise)
        told = (rates.false_alarm, rates.found, rates.exact, rates.extra)
        chain_lines.append([f"{noise:.2%}", *map(share, told)])
    what = f"{num_histories} histories of {num_nights} nights, a step of {step:.0%} planted in each"
    of_ratios = render_table(["noise of a ratio", *headers[2:]], chain_lines)
    return f"{what}\n{render_table(headers, lines)}\n\nratios of commits measured in turns\n{of_ratios}"


def _remembering(noise: Floats, memory: float) -> Floats:
    """AR(1) of the same standard deviation."""
    made = noise.copy()
    for night in range(1, len(made)):
        made[night] = memory * made[night - 1] + np.sqrt(1 - memory**2) * noise[night]
    return made
