"""The load that a run asks for, read from its options. An option that would have no effect is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from adapters.base import ConfigError
from harness.plan.arrival_times import KIND_OF, PROCESSES, Arrivals, Load, above_zero


def make_load(
    *,
    concurrency: int,
    rate: float | None,
    arrivals: str | None,
    think_ms: float | None = None,
    think: Literal["exponential", "fixed"] | None = None,
    ramp_s: float | None = None,
    **parameters: float | None,
) -> Load:
    """A rate means an open loop, its absence a closed one. `parameters` are those of `KIND_OF`.

    Raises:
        ConfigError: the values contradict each other, make no load, or one of them has no effect.
    """
    if rate is None:
        if arrivals not in (None, "", Arrivals.CLOSED):
            raise ConfigError(f"ARRIVALS={arrivals} needs a RATE in requests a second")
        if concurrency < 1:
            raise ConfigError(f"CONCURRENCY must be at least 1, not {concurrency}")
        refuse_parameters(parameters)
        if think is not None and think_ms is None:
            raise ConfigError(f"THINK={think} needs THINK_MS, the mean")
        spread = (think or "exponential") if think_ms is not None else None
        return Load(Arrivals.CLOSED, concurrency=concurrency, think_ms=think_ms, think=spread, ramp_s=ramp_s)
    refuse_of_closed(think_ms=think_ms, think=think, ramp_s=ramp_s)
    above_zero("requests a second")("RATE", rate, rate)
    name = arrivals or Arrivals.POISSON
    kind = next((known for known in PROCESSES if known == name), None)
    if kind is None:
        *most, last = PROCESSES
        known = f"{', '.join(most)} or {last}"
        raise ConfigError(
            f"ARRIVALS must be {known} when RATE is given, not {name!r}; TRACE= replays a trace"
        )
    refuse_parameters({name: value for name, value in parameters.items() if KIND_OF[name] is not kind})
    checks = PROCESSES[kind].parameters
    chosen: dict[str, Any] = {name: check(name, parameters.get(name), rate) for name, check in checks.items()}
    return Load(kind, concurrency=concurrency, rate=rate, **chosen)


def load_words(rate: float | None, users: int | None) -> str:
    """As `4 requests/s` or `16 users`."""
    return f"{users} users" if rate is None else f"{rate:.3g} requests/s"


def refuse_of_closed(**given: object) -> None:
    """
    Raises:
        ConfigError: one is given for a load that is no closed loop.
    """
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name.upper()}={value} needs a closed loop: arrivals do not wait for answers")


def parse_loads(text: str) -> list[float | None]:
    """`closed 0.5 0.8` -> None for a closed loop, and shares of a capacity.

    Raises:
        ConfigError: there is none, one twice, or one is neither.
    """
    loads: list[float | None] = []
    for word in text.replace(",", " ").split():
        try:
            share = None if word == Arrivals.CLOSED else float(word)
        except ValueError:
            share = -1.0
        if share is not None and not 0 < share <= 10:
            raise ConfigError(f"LOADS: {word!r} is neither closed nor a share of the capacity such as 0.75")
        if share in loads:
            raise ConfigError(f"LOADS: {word} stands there twice")
        loads.append(share)
    if not loads:
        raise ConfigError("LOADS names no load")
    return loads


def rate_of_share(share: float, capacity: float) -> float:
    """To three digits, so that the rate is the same wherever it is computed."""
    return float(f"{share * capacity:.3g}")


def refuse_parameters(given: Mapping[str, float | None]) -> None:
    """For a load that takes none of these options.

    Raises:
        ConfigError: one is given, and would have no effect.
    """
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name.upper()}={value:g} needs ARRIVALS={KIND_OF[name]} and a RATE")
