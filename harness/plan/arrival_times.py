"""Arrival times of an open loop, from a load and one seed.

What enters are a number of requests, a `Load` and a seed; what leaves are offsets in s from the start of the
run. Draws are SHA-256 of a counter, so no library's generator can change them, and nothing is clamped or
rescaled afterwards: mean and spread are those of the distribution.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

from harness.plan.load import Arrivals, Load


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


def arrival_times(num_requests: int, load: Load, seed: int) -> list[float]:
    """Offsets in s, kept to whole nanoseconds: libraries differ in a logarithm's last bit."""
    assert load.rate is not None, "an open loop"
    if load.arrivals is Arrivals.CONSTANT:
        return [round(index / load.rate, 9) for index in range(num_requests)]
    times = _TIMES[load.arrivals](load, load.rate, Draws(seed), num_requests)
    return [round(next(times), 9) for _ in range(num_requests)]


def _poisson(load: Load, rate: float, draws: Draws, num: int) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += draws.exponential() / rate
        yield now_s


def _gamma(load: Load, rate: float, draws: Draws, num: int) -> Iterator[float]:
    """Gaps of mean 1 / rate and the asked coefficient of variation, which is 1 / sqrt(shape)."""
    assert load.cv is not None
    shape = 1 / load.cv**2
    now_s = 0.0
    while True:
        now_s += draws.gamma(shape) / shape / rate
        yield now_s


def _onoff(load: Load, rate: float, draws: Draws, num: int) -> Iterator[float]:
    """Poisson while on, so fast that the mean over whole cycles is `rate`."""
    assert load.on_s is not None
    assert load.off_s is not None
    cycle_s = load.on_s + load.off_s
    on_time_s = 0.0
    while True:
        on_time_s += draws.exponential() / (rate * cycle_s / load.on_s)
        cycles, within_s = divmod(on_time_s, load.on_s)
        yield cycles * cycle_s + within_s


def _ramp(load: Load, rate: float, draws: Draws, num: int) -> Iterator[float]:
    """Poisson with a rate that goes evenly from `rate_from` to 2 `rate` - `rate_from`, then stays."""
    assert load.rate_from is not None
    start, end = load.rate_from, 2 * rate - load.rate_from
    length_s = num / rate
    expected = 0.0
    while True:
        expected += draws.exponential()
        if expected >= num:
            yield length_s + (expected - num) / (end or rate)
            continue
        slope = (end - start) / length_s
        # start t + slope t^2 / 2 = expected, in the form that loses no digits when the slope is small.
        yield 2 * expected / (start + math.sqrt(start * start + 2 * slope * expected))


_Times = Callable[[Load, float, Draws, int], Iterator[float]]
_TIMES: dict[Arrivals, _Times] = {
    Arrivals.POISSON: _poisson,
    Arrivals.GAMMA: _gamma,
    Arrivals.ONOFF: _onoff,
    Arrivals.RAMP: _ramp,
}
