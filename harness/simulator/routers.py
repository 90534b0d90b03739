"""Which replica gets a request: the router's one question, asked once a request.

A router knows what it has sent and, as late as the information delay makes it, what has ended and how many
wait in each replica's queue. It knows nothing of what a replica is doing now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

from adapters.base import ConfigError


@dataclass(slots=True)
class FleetView:
    """What the router sees, by replica."""

    outstanding: list[int]
    """Prompts sent whose answers have not ended."""
    tokens: list[int]
    """Prompt and output tokens of those."""
    waiting: list[int]
    """Prompts without a slot, as the replica said last."""
    random: Random = field(default_factory=Random)

    @classmethod
    def of(cls, num_replicas: int, seed: int) -> FleetView:
        outstanding, tokens, waiting = ([0] * num_replicas for _ in range(3))
        return cls(outstanding, tokens, waiting, Random(seed))


Choose = Callable[[FleetView], int]


def _round_robin() -> Choose:
    numbers = count()
    return lambda view: next(numbers) % len(view.outstanding)


def _random() -> Choose:
    return lambda view: view.random.randrange(len(view.outstanding))


def _two_choices() -> Choose:
    """Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (IEEE TPDS 2001)."""

    def choose(view: FleetView) -> int:
        num = len(view.outstanding)
        if num == 1:
            return 0
        first, second = view.random.sample(range(num), 2)
        return first if view.outstanding[first] <= view.outstanding[second] else second

    return choose


def _least(loads: Callable[[FleetView], list[int]]) -> Callable[[], Choose]:
    def choose(view: FleetView) -> int:
        values = loads(view)
        return values.index(min(values))

    return lambda: choose


def _jsq() -> Choose:
    """The shortest queue; of equals the one with the fewest outstanding."""

    def choose(view: FleetView) -> int:
        pairs = list(zip(view.waiting, view.outstanding, strict=True))
        return pairs.index(min(pairs))

    return choose


ROUTERS: dict[str, Callable[[], Choose]] = {
    "round_robin": _round_robin,
    "random": _random,
    "two_choices": _two_choices,
    "least_outstanding": _least(lambda view: view.outstanding),
    "least_tokens": _least(lambda view: view.tokens),
    "jsq": _jsq,
}
READS_WAITING = {"jsq"}


def make_router(name: str) -> Choose:
    """
    Raises:
        ConfigError: there is no router of this name.
    """
    if name not in ROUTERS:
        raise ConfigError(f"there is no router {name!r}: it must be one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()
