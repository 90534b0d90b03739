"""The schedule of a run, made in full before its first request.

What enters are prompts, a number of requests, a load and one seed; what leaves is a frozen `Schedule`
with a digest. Prompts come in the order of the corpus, from its first line on, so that every run of n
requests replays the same n prompts. Each random dimension (arrival times, sampling) draws from a seed of
its own, derived from the one given, so that changing the rate does not change the sampling. Draws are
SHA-256 of a counter: no library's generator can change them. Nothing is clamped or rescaled afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, islice

from adapters.base import ConfigError
from harness.corpus import Prompt


class Arrivals(StrEnum):
    CLOSED = "closed"
    POISSON = "poisson"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One prompt of the schedule. `offset_s` counts from the start of the run; None in a closed loop."""

    index: int
    prompt_id: str
    prompt: str
    max_tokens: int
    seed: int
    offset_s: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: `concurrency` users in a closed loop, else `rate` requests a second."""

    arrivals: Arrivals
    concurrency: int = 1
    rate: float | None = None

    @property
    def is_open(self) -> bool:
        return self.arrivals is not Arrivals.CLOSED


@dataclass(frozen=True, slots=True)
class Schedule:
    load: Load
    requests: tuple[PlannedRequest, ...]
    seeds: dict[str, int]
    digest: str

    @property
    def last_offset_s(self) -> float:
        return self.requests[-1].offset_s or 0.0


def make_load(*, concurrency: int, rate: float | None, arrivals: str | None) -> Load:
    """Read the load that was asked for: a rate means an open loop, its absence a closed one.

    Raises:
        ConfigError: the values contradict each other or make no load.
    """
    if rate is None:
        if arrivals not in (None, "", Arrivals.CLOSED):
            raise ConfigError(f"ARRIVALS={arrivals} needs a RATE in requests a second")
        if concurrency < 1:
            raise ConfigError(f"CONCURRENCY must be at least 1, not {concurrency}")
        return Load(Arrivals.CLOSED, concurrency=concurrency)
    if not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"RATE must be a number above 0 (requests a second), not {rate}")
    kind = arrivals or Arrivals.POISSON
    if kind not in (Arrivals.POISSON, Arrivals.CONSTANT):
        raise ConfigError(f"ARRIVALS must be poisson or constant when RATE is given, not {kind!r}")
    return Load(Arrivals(kind), concurrency=concurrency, rate=rate)


def derive_seed(seed: int, dimension: str) -> int:
    """A 63-bit seed for one dimension; neighbouring seeds give unrelated ones."""
    return int.from_bytes(_block(f"{seed}/{dimension}")[:8], "big") >> 1


def make_schedule(prompts: Sequence[Prompt], num_requests: int, load: Load, seed: int) -> Schedule:
    """Plan every request. More requests than prompts go over the corpus again.

    Raises:
        ConfigError: `num_requests` is below 1.
    """
    if num_requests < 1:
        raise ConfigError(f"REQUESTS must be at least 1, not {num_requests}")
    seeds = {name: derive_seed(seed, name) for name in ("arrivals", "sampling")}
    offsets = _offsets(num_requests, load, seeds["arrivals"])
    requests = tuple(
        PlannedRequest(
            index=index,
            prompt_id=prompt.id,
            prompt=prompt.prompt,
            max_tokens=prompt.max_tokens,
            # 31 bits: the widest seed that every server of this API takes.
            seed=int.from_bytes(_block(f"{seeds['sampling']}/{index}")[:4], "big") >> 1,
            offset_s=offsets[index],
        )
        for index, prompt in enumerate(islice(cycle(prompts), num_requests))
    )
    entries = [(r.index, r.prompt_id, r.max_tokens, r.seed, r.offset_s) for r in requests]
    return Schedule(load=load, requests=requests, seeds=seeds, digest=schedule_digest(load, entries))


def schedule_digest(load: Load, entries: Iterable[tuple[int, str, int, int, float | None]]) -> str:
    """SHA-256 over canonical JSON of the load and (index, prompt id, max_tokens, seed, offset in s)."""
    content = {
        "arrivals": load.arrivals.value,
        "concurrency": None if load.is_open else load.concurrency,
        "rate": load.rate,
        "requests": [list(entry) for entry in entries],
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _offsets(num_requests: int, load: Load, seed: int) -> list[float | None]:
    """Arrival times in s, kept to whole nanoseconds: libraries differ in a logarithm's last bit."""
    if load.rate is None:
        return [None] * num_requests
    offsets: list[float | None] = []
    now_s = 0.0
    for index in range(num_requests):
        if load.arrivals is Arrivals.CONSTANT:
            now_s = index / load.rate
        else:
            now_s += -math.log(_uniform(seed, index)) / load.rate
        offsets.append(round(now_s, 9))
    return offsets


def _uniform(seed: int, index: int) -> float:
    """A draw from (0, 1]."""
    return ((int.from_bytes(_block(f"{seed}/{index}")[:8], "big") >> 11) + 1) / (1 << 53)


def _block(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
