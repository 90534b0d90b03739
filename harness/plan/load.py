"""How requests arrive: the kinds of load and what describes each of them.

What enters are the options of a run; what leaves is a frozen `Load`, which manifest and digest spell out.
Makes no arrival times (`arrival_times` does) and knows no prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapters.base import ConfigError


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
    `rate`. `trace_sha256`, `time_scale`: which trace, and by what its times were multiplied.
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

    @property
    def is_open(self) -> bool:
        return self.arrivals is not Arrivals.CLOSED

    @property
    def shape(self) -> dict[str, float | str]:
        """What this kind of load has beyond a rate; empty for the plain ones."""
        names = ("cv", "on_s", "off_s", "rate_from", "trace_sha256", "time_scale")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def make_load(
    *,
    concurrency: int,
    rate: float | None,
    arrivals: str | None,
    cv: float | None = None,
    on_s: float | None = None,
    off_s: float | None = None,
    rate_from: float | None = None,
) -> Load:
    """Read the load that was asked for: a rate means an open loop, its absence a closed one.

    Raises:
        ConfigError: the values contradict each other, make no load, or one of them has no effect.
    """
    shape = {"cv": cv, "on_s": on_s, "off_s": off_s, "rate_from": rate_from}
    if rate is None:
        if arrivals not in (None, "", Arrivals.CLOSED):
            raise ConfigError(f"ARRIVALS={arrivals} needs a RATE in requests a second")
        if concurrency < 1:
            raise ConfigError(f"CONCURRENCY must be at least 1, not {concurrency}")
        refuse_shape(shape)
        return Load(Arrivals.CLOSED, concurrency=concurrency)
    _check_positive("RATE", rate, "requests a second")
    kind = arrivals or Arrivals.POISSON
    if kind not in (*Arrivals,) or kind in (Arrivals.CLOSED, Arrivals.TRACE):
        known = "poisson, constant, gamma, onoff or ramp"
        raise ConfigError(
            f"ARRIVALS must be {known} when RATE is given, not {kind!r}; TRACE= replays a trace"
        )
    refuse_shape({name: value for name, value in shape.items() if _KIND_OF[name] != kind})
    extra: dict[str, Any] = {}
    if kind == Arrivals.GAMMA:
        extra = {"cv": _check_positive("CV", cv, "the coefficient of variation of gaps; 1 is Poisson")}
    elif kind == Arrivals.ONOFF:
        extra = {
            "on_s": _check_positive("ON_S", on_s, "length of a burst"),
            "off_s": _check_positive("OFF_S", off_s, "silence after a burst"),
        }
    elif kind == Arrivals.RAMP:
        start = 0.0 if rate_from is None else rate_from
        if not 0 <= start <= 2 * rate:
            raise ConfigError(
                f"RATE_FROM must be from 0 to twice the mean RATE ({2 * rate:g}), not {start:g}"
            )
        extra = {"rate_from": start}
    return Load(Arrivals(kind), concurrency=concurrency, rate=rate, **extra)


_KIND_OF = {
    "cv": Arrivals.GAMMA,
    "on_s": Arrivals.ONOFF,
    "off_s": Arrivals.ONOFF,
    "rate_from": Arrivals.RAMP,
}


def refuse_shape(given: Mapping[str, float | None]) -> None:
    """For a load that takes none of these options.

    Raises:
        ConfigError: one is given, and would have no effect.
    """
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name.upper()}={value:g} needs ARRIVALS={_KIND_OF[name]} and a RATE")


def _check_positive(name: str, value: float | None, what: str) -> float:
    if value is None or not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name} must be a number above 0 ({what}), not {value}")
    return value
