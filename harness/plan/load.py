"""The load that was asked for: a closed loop of users, or requests at a rate.

`arrival_times` holds the kinds of open loops and checks their options. Manifest and digest hold a `Load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.base import ConfigError
from harness.plan.arrival_times import PROCESSES, Arrivals, Draws, positive

SHAPE_OPTIONS = tuple(dict.fromkeys(name for process in PROCESSES.values() for name in process.options))
"""Settings that describe one kind of arrivals."""


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` users in a closed loop, else on average `rate` requests a second."""

    arrivals: Arrivals
    concurrency: int = 1
    rate: float | None = None
    shape: dict[str, float | str] = field(default_factory=dict)
    """What this kind of load has beyond a rate; empty for the plain ones."""

    @property
    def is_open(self) -> bool:
        return self.arrivals is not Arrivals.CLOSED

    def arrival_times(self, num_requests: int, seed: int) -> list[float]:
        """Offsets in s, kept to whole nanoseconds: libraries differ in a logarithm's last bit."""
        assert self.rate is not None, "an open loop"
        times = PROCESSES[self.arrivals].times(self.rate, num_requests, Draws(seed), **self.shape)
        return [round(next(times), 9) for _ in range(num_requests)]


def make_load(*, concurrency: int, rate: float | None, arrivals: str | None, **shape: float | None) -> Load:
    """Read the load that was asked for: a rate means an open loop, its absence a closed one.

    Raises:
        ConfigError: the values contradict each other, make no load, or one of them has no effect.
    """
    if rate is None:
        if arrivals not in (None, "", Arrivals.CLOSED):
            raise ConfigError(f"ARRIVALS={arrivals} needs a RATE in requests a second")
        if concurrency < 1:
            raise ConfigError(f"CONCURRENCY must be at least 1, not {concurrency}")
        refuse_shape(shape)
        return Load(Arrivals.CLOSED, concurrency=concurrency)
    positive("requests a second")("RATE", rate, rate)
    kind = arrivals or Arrivals.POISSON
    if kind not in PROCESSES:
        *known, last = PROCESSES
        raise ConfigError(
            f"ARRIVALS must be {', '.join(known)} or {last} when RATE is given, not {kind!r}; "
            "TRACE= replays a trace"
        )
    kind = Arrivals(kind)
    options = PROCESSES[kind].options
    refuse_shape({name: value for name, value in shape.items() if name not in options})
    used: dict[str, float | str] = {
        name: check(name, shape.get(name), rate) for name, check in options.items()
    }
    return Load(kind, concurrency, rate, used)


def refuse_shape(given: Mapping[str, float | None]) -> None:
    """For a load that takes none of these options.

    Raises:
        ConfigError: one is given, and would have no effect.
    """
    for name, value in given.items():
        if value is not None:
            kinds = " or ".join(kind for kind, process in PROCESSES.items() if name in process.options)
            raise ConfigError(f"{name.upper()}={value:g} needs ARRIVALS={kinds} and a RATE")
