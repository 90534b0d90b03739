"""Which replica gets a request: the router's one question, asked once a request.

A router knows which replicas are up, what it has sent and, as late as the information delay makes it, what
has ended and how many wait in each replica's queue. It knows nothing of what a replica is doing now.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random

from adapters.base import ConfigError
from harness.plan.schedule import PlannedRequest


@dataclass(slots=True)
class FleetView:
    """What the router sees, by replica."""

    outstanding: list[int] = field(default_factory=list)
    """Prompts sent whose answers have not ended."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and output tokens of those."""
    waiting: list[int] = field(default_factory=list)
    """Prompts without a slot, as the replica said last."""
    up: list[int] = field(default_factory=list)
    """Who takes requests, in order; at least one where a router is asked."""
    random: Random = field(default_factory=Random)

    def add(self) -> None:
        """One replica more, which is not up yet."""
        for values in (self.outstanding, self.tokens, self.waiting):
            values.append(0)

    def note(self, index: int, num_prompts: int, num_tokens: int) -> None:
        """Sent, or, below 0, ended."""
        self.outstanding[index] += num_prompts
        self.tokens[index] += num_tokens

    def of_up(self, values: list[int]) -> list[int]:
        return values if len(self.up) == len(values) else [values[index] for index in self.up]


Choose = Callable[[FleetView, PlannedRequest], int]


def _round_robin() -> Choose:
    numbers = count()
    return lambda view, request: view.up[next(numbers) % len(view.up)]


def _random() -> Choose:
    return lambda view, request: view.random.choice(view.up)


def _two_choices() -> Choose:
    """Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (IEEE TPDS 2001)."""

    def choose(view: FleetView, request: PlannedRequest) -> int:
        if len(view.up) == 1:
            return view.up[0]
        first, second = view.random.sample(view.up, 2)
        return first if view.outstanding[first] <= view.outstanding[second] else second

    return choose


def _least(loads: Callable[[FleetView], list[int]]) -> Callable[[], Choose]:
    """Equals take turns, as in nginx and Envoy."""

    def make() -> Choose:
        last = -1

        def choose(view: FleetView, request: PlannedRequest) -> int:
            nonlocal last
            values = loads(view)
            least = min(values)
            last = _next(values, least, last)
            return view.up[last]

        return choose

    return make


def _next(values: Sequence[object], wanted: object, last: int) -> int:
    """The next place of `wanted` behind `last`, from the start again where there is none."""
    try:
        return values.index(wanted, last + 1)
    except ValueError:
        return values.index(wanted)


def _jsq() -> Choose:
    """The shortest queue; of equals the one with the fewest outstanding."""

    def choose(view: FleetView, request: PlannedRequest) -> int:
        return min(view.up, key=lambda index: (view.waiting[index], view.outstanding[index]))

    return choose


_POINTS = 64
"""Of each replica on the ring."""
_MOST_LOAD = 1.25
_PREFIX_BYTES = 256


def _place(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _hashed(key_of: Callable[[PlannedRequest], str], *, is_bounded: bool) -> Callable[[], Choose]:
    """Equal keys to one replica, by consistent hashing: where one leaves, only its keys move.

    Source: Karger et al. (STOC 1997); the bound on a replica's load is that of Mirrokni et al. (SODA 2018).
    """

    def make() -> Choose:
        ring: list[tuple[int, int]] = []
        on_ring: list[int] = []

        def choose(view: FleetView, request: PlannedRequest) -> int:
            nonlocal ring, on_ring
            if on_ring != view.up:
                on_ring = view.up.copy()
                ring = sorted((_place(f"{index}/{i}"), index) for index in on_ring for i in range(_POINTS))
            loads = view.of_up(view.outstanding)
            bound = _MOST_LOAD * (sum(loads) + 1) / len(loads) if is_bounded else float("inf")
            start = bisect_left(ring, (_place(key_of(request)), 0))
            for step in range(len(ring)):
                index = ring[(start + step) % len(ring)][1]
                if view.outstanding[index] < bound:
                    return index
            raise AssertionError("some replica has no more than the mean")

        return choose

    return make


def _prefix(request: PlannedRequest) -> str:
    prompt = request.prompt
    return prompt[:_PREFIX_BYTES] if isinstance(prompt, str) else str(prompt[: _PREFIX_BYTES // 4])


ROUTERS: dict[str, Callable[[], Choose]] = {
    "round_robin": _round_robin,
    "random": _random,
    "two_choices": _two_choices,
    "least_outstanding": _least(lambda view: view.of_up(view.outstanding)),
    "least_tokens": _least(lambda view: view.of_up(view.tokens)),
    "jsq": _jsq,
    "session": _hashed(lambda request: request.user or request.prompt_id, is_bounded=False),
    "prefix": _hashed(_prefix, is_bounded=True),
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
