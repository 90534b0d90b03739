"""Arrival processes of an open loop: `PROCESSES` holds all of them and the options that each one takes.

Draws are SHA-256 of a counter, so no library's generator can change them. Nothing is clamped or rescaled
afterwards: mean and spread are those of the distribution.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count

from adapters.base import ConfigError


class Arrivals(StrEnum):
    CLOSED = "closed"
    POISSON = "poisson"
    CONSTANT = "constant"
    GAMMA = "gamma"
    ONOFF = "onoff"
    RAMP = "ramp"
    TRACE = "trace"


class Draws:
    """Uniform, exponential, normal and gamma numbers of one seed, in a fixed order."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._next = 0

    def uniform(self) -> float:
        """From (0, 1]."""
        index, self._next = self._next, self._next + 1
        block = hashlib.sha256(f"{self._seed}/{index}".encode()).digest()
        return ((int.from_bytes(block[:8], "big") >> 11) + 1) / (1 << 53)

    def exponential(self) -> float:
        return -math.log(self.uniform())

    def normal(self) -> float:
        return math.sqrt(2 * self.exponential()) * math.cos(2 * math.pi * self.uniform())

    def gamma(self, shape: float) -> float:
        """Of mean `shape`. Source: Marsaglia and Tsang (2000), with their step for shapes below 1."""
        if shape < 1:
            return float(self.gamma(shape + 1) * self.uniform() ** (1 / shape))
        d = shape - 1 / 3
        c = 1 / math.sqrt(9 * d)
        while True:
            x = self.normal()
            v = (1 + c * x) ** 3
            if v > 0 and math.log(self.uniform()) < 0.5 * x * x + d - d * v + d * math.log(v):
                return d * v


Check = Callable[[str, float | None, float], float]
"""From an option's name, its value and the rate to the value to use. Raises ConfigError for a bad one."""


@dataclass(frozen=True, slots=True)
class Process:
    """`times(rate, num_requests, draws, **options)` yields offsets in s, of `rate` a second on average.

    Each option is a setting of the harness of the same name.
    """

    times: Callable[..., Iterator[float]]
    options: Mapping[str, Check] = field(default_factory=dict)


def positive(what: str) -> Check:
    """For an option that must be given, and above 0."""

    def check(name: str, value: float | None, rate: float) -> float:
        if value is None or not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name.upper()} must be a number above 0 ({what}), not {value}")
        return value

    return check


def _constant(rate: float, num: int, draws: Draws) -> Iterator[float]:
    return (index / rate for index in count())


def _poisson(rate: float, num: int, draws: Draws) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += draws.exponential() / rate
        yield now_s


def _gamma(rate: float, num: int, draws: Draws, cv: float) -> Iterator[float]:
    """Gaps of mean 1 / rate and the asked coefficient of variation, which is 1 / sqrt(shape)."""
    shape = 1 / cv**2
    now_s = 0.0
    while True:
        now_s += draws.gamma(shape) / shape / rate
        yield now_s


def _onoff(rate: float, num: int, draws: Draws, on_s: float, off_s: float) -> Iterator[float]:
    """Poisson while on, so fast that the mean over whole cycles is `rate`."""
    cycle_s = on_s + off_s
    on_time_s = 0.0
    while True:
        on_time_s += draws.exponential() / (rate * cycle_s / on_s)
        cycles, within_s = divmod(on_time_s, on_s)
        yield cycles * cycle_s + within_s


def _ramp(rate: float, num: int, draws: Draws, rate_from: float) -> Iterator[float]:
    """Poisson with a rate that goes evenly from `rate_from` to 2 `rate` - `rate_from`, then stays."""
    end = 2 * rate - rate_from
    length_s = num / rate
    expected = 0.0
    while True:
        expected += draws.exponential()
        if expected >= num:
            yield length_s + (expected - num) / (end or rate)
            continue
        slope = (end - rate_from) / length_s
        # rate_from t + slope t^2 / 2 = expected, in the form that loses no digits when the slope is small.
        yield 2 * expected / (rate_from + math.sqrt(rate_from * rate_from + 2 * slope * expected))


def _start_of_ramp(name: str, value: float | None, rate: float) -> float:
    start = 0.0 if value is None else value
    if not 0 <= start <= 2 * rate:
        raise ConfigError(
            f"{name.upper()} must be from 0 to twice the mean RATE ({2 * rate:g}), not {start:g}"
        )
    return start


PROCESSES: dict[Arrivals, Process] = {
    Arrivals.POISSON: Process(_poisson),
    Arrivals.CONSTANT: Process(_constant),
    Arrivals.GAMMA: Process(_gamma, {"cv": positive("the coefficient of variation of gaps; 1 is Poisson")}),
    Arrivals.ONOFF: Process(
        _onoff, {"on_s": positive("length of a burst"), "off_s": positive("silence after a burst")}
    ),
    Arrivals.RAMP: Process(_ramp, {"rate_from": _start_of_ramp}),
}
