"""How requests arrive: every kind of load, its parameters and its arrival times, each kind in one place.

A new arrival process is a member of `Arrivals`, a field of `Load` for each parameter and an entry of
`PROCESSES`, all below; `harness/settings.py` makes the parameter an option. Times are neither clamped nor
rescaled: mean and spread are those of the distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Literal

from adapters.base import ConfigError
from harness.plan.draws import Draws


class Arrivals(StrEnum):
    CLOSED = "closed"
    POISSON = "poisson"
    CONSTANT = "constant"
    GAMMA = "gamma"
    ONOFF = "onoff"
    RAMP = "ramp"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` users in a closed loop, else on average `rate` requests a second.

    `cv`: coefficient of variation of gaps between gamma arrivals. `on_s`, `off_s`: bursts of Poisson
    arrivals and the silence between them. `rate_from`: where a ramp begins that ends so that its mean is
    `rate`. `trace_sha256`, `time_scale`: which trace, and by what its times were multiplied. A closed loop
    has `think_ms`, the mean of what a user thinks before each request but the first, `think`, how that is
    spread, and `ramp_s`, within which the users begin.
    """

    arrivals: Arrivals
    concurrency: int = 1
    rate: float | None = None
    cv: float | None = None
    on_s: float | None = None
    off_s: float | None = None
    rate_from: float | None = None
    trace_sha256: str | None = None
    time_scale: float | None = None
    think_ms: float | None = None
    think: Literal["exponential", "fixed"] | None = None
    ramp_s: float | None = None

    @property
    def is_open(self) -> bool:
        return self.arrivals is not Arrivals.CLOSED

    @property
    def shape(self) -> dict[str, float | str]:
        """What this kind of load has beyond a rate; empty for the plain ones."""
        names = [each.name for each in fields(self)[3:]]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def think_times(num_requests: int, load: Load, seed: int) -> list[float]:
    """What the user of each request thinks before it, in s, kept to whole nanoseconds."""
    mean_s = (load.think_ms or 0.0) / 1e3
    draws = Draws(seed)
    is_fixed = load.think == "fixed" or not mean_s
    return [round(mean_s * (1.0 if is_fixed else draws.exponential()), 9) for _ in range(num_requests)]


Check = Callable[[str, float | None, float], float]
"""A parameter's name, its value (None: not given) and the rate -> the value to use, or ConfigError."""


@dataclass(frozen=True, slots=True)
class ArrivalProcess:
    """`times`: at least so many offsets in s, from a load, its rate, draws and the number asked for.

    `parameters`: fields of `Load` that it needs beyond the rate.
    """

    times: Callable[[Load, float, Draws, int], Iterator[float]]
    parameters: Mapping[str, Check] = field(default_factory=dict)


def arrival_times(num_requests: int, load: Load, seed: int) -> list[float]:
    """Offsets in s from the start, kept to whole nanoseconds: libraries differ in a logarithm's last bit."""
    assert load.rate is not None, "an open loop"
    times = PROCESSES[load.arrivals].times(load, load.rate, Draws(seed), num_requests)
    return [round(next(times), 9) for _ in range(num_requests)]


def above_zero(meaning: str) -> Check:
    def check(name: str, value: float | None, rate: float) -> float:
        if value is None or not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name.upper()} must be a number above 0 ({meaning}), not {value}")
        return value

    return check


def _constant(load: Load, rate: float, draws: Draws, num: int) -> Iterator[float]:
    return (index / rate for index in range(num))


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


def _ramp_start(name: str, value: float | None, rate: float) -> float:
    start = 0.0 if value is None else value
    if not 0 <= start <= 2 * rate:
        raise ConfigError(
            f"{name.upper()} must be from 0 to twice the mean RATE ({2 * rate:g}), not {start:g}"
        )
    return start


PROCESSES: Mapping[Arrivals, ArrivalProcess] = {
    Arrivals.POISSON: ArrivalProcess(_poisson),
    Arrivals.CONSTANT: ArrivalProcess(_constant),
    Arrivals.GAMMA: ArrivalProcess(
        _gamma, {"cv": above_zero("the coefficient of variation of gaps; 1 is Poisson")}
    ),
    Arrivals.ONOFF: ArrivalProcess(
        _onoff, {"on_s": above_zero("length of a burst"), "off_s": above_zero("silence after a burst")}
    ),
    Arrivals.RAMP: ArrivalProcess(_ramp, {"rate_from": _ramp_start}),
}
KIND_OF: Mapping[str, Arrivals] = {
    name: kind for kind, process in PROCESSES.items() for name in process.parameters
}
"""Which kind of load a parameter belongs to."""
