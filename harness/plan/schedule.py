"""The schedule of a run, made in full before its first request, with a digest over all of it.

Prompts come in the order of the corpus, from its first line on, so every run of n requests replays the same n
prompts; a numbered draw takes another sample of the corpus and other arrivals instead. Arrival times and
sampling draw from seeds of their own, both derived from the one given: another rate leaves the sampling as
it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from adapters.base import ConfigError
from harness.plan.arrival_times import Arrivals, Load, arrival_times, think_times
from harness.plan.corpus import Prompt
from harness.plan.load import make_load
from services.contract.requests import ChatMessage

__all__ = [
    "Arrivals",
    "Load",
    "PlannedRequest",
    "Schedule",
    "derive_seed",
    "make_load",
    "make_schedule",
    "schedule_digest",
]


@dataclass(slots=True)  # not frozen, which takes three times as long: each request makes one
class PlannedRequest:
    """One prompt of the schedule. `offset_s` counts from the start of the run; None in a closed loop."""

    index: int
    prompt_id: str
    prompt: str | tuple[int, ...]
    """Text, or token ids."""
    max_tokens: int
    seed: int
    offset_s: float | None = None
    think_s: float = 0.0
    """Closed loop: from the end of this user's last answer to this request."""
    is_chat: bool = False
    """Sent as the message of a user, which the server puts into the model's chat template."""
    messages: tuple[ChatMessage, ...] = ()
    """Instead of the prompt: a chat of several turns."""
    user: str | None = None
    priority: int | None = None

    @property
    def chat(self) -> list[dict[str, object]]:
        """The messages of a chat as they are sent."""
        if not self.messages:
            return [{"role": "user", "content": self.prompt}]
        return [message.model_dump(exclude_unset=True) for message in self.messages]


@dataclass(frozen=True, slots=True)
class Schedule:
    load: Load
    requests: tuple[PlannedRequest, ...]
    """Those of this shard."""
    seeds: dict[str, int]
    digest: str
    """Of the whole schedule, whatever part this is, and of its salt."""
    shard: tuple[int, int] = (0, 1)
    """Which part of how many."""
    salt: str | None = None
    """Of the numbers in front of prompts (`harness.plan.salt`)."""
    unsalted_digest: str | None = None
    """Runs of one schedule have it in common, whatever their salt."""
    draw: int | None = None
    """Which sample of the corpus and which arrivals; None for the corpus in its order."""
    num_blocks: int = 1
    """Of the comparison that this is one block of."""

    @property
    def num_users(self) -> int:
        """Users of a closed loop that belong to this shard."""
        index, of = self.shard
        return self.load.concurrency // of + (index < self.load.concurrency % of)

    @property
    def part_digest(self) -> str:
        return salted_digest(
            schedule_digest(self.load, [entry_of(request) for request in self.requests]), self.salt
        )

    def salted(self, salt: str | None) -> Schedule:
        if salt is None:
            return self
        digest = salted_digest(self.digest, salt)
        return replace(self, salt=salt, digest=digest, unsalted_digest=self.digest)

    def part(self, index: int, of: int) -> Schedule:
        """Every `of`-th request, from number `index` on. Parts of parts are parts of the whole.

        Raises:
            ConfigError: a closed loop has fewer users than there are parts.
        """
        outer_index, outer_of = self.shard
        shard = (outer_index + index * outer_of, outer_of * of)
        if not self.load.is_open and self.load.concurrency < shard[1]:
            raise ConfigError(f"{self.load.concurrency} users cannot be split into {shard[1]} parts")
        return replace(self, requests=self.requests[index::of], shard=shard)


def entry_of(request: PlannedRequest) -> tuple[int, str, int, int, float | None]:
    """What the digest covers of one request."""
    return request.index, request.prompt_id, request.max_tokens, request.seed, request.offset_s


def derive_seed(seed: int, dimension: str) -> int:
    """A 63-bit seed for one dimension; neighbouring seeds give unrelated ones."""
    return int.from_bytes(_block(f"{seed}/{dimension}")[:8], "big") >> 1


def make_schedule(
    prompts: Sequence[Prompt],
    num_requests: int,
    load: Load,
    seed: int,
    *,
    offsets_s: Sequence[float] | None = None,
    draw: int | None = None,
) -> Schedule:
    """Plan every request. More requests than prompts go over the corpus again.

    `offsets_s` are the arrival times of a trace; other loads make theirs from the seed. Draws of one seed are
    samples without replacement of the corpus, independent of each other.

    Raises:
        ConfigError: `num_requests` is below 1.
    """
    if num_requests < 1:
        raise ConfigError(f"REQUESTS must be at least 1, not {num_requests}")
    of_draw = "" if draw is None else f"/{draw}"
    seeds = {name: derive_seed(seed, f"{name}{of_draw}") for name in ("arrivals", "sampling")}
    if draw is not None:
        seeds["sample"] = derive_seed(seed, f"sample{of_draw}")
        order = sorted(range(len(prompts)), key=lambda line: _block(f"{seeds['sample']}/{line}"))
        prompts = [prompts[line] for line in order]
    offsets: Sequence[float | None] = [None] * num_requests
    if load.is_open:
        offsets = offsets_s or arrival_times(num_requests, load, seeds["arrivals"])
    # From a seed of its own: thinking changes neither prompts nor sampling.
    think_s = [0.0] * num_requests
    if load.think_ms is not None:
        seeds["think"] = derive_seed(seed, f"think{of_draw}")
        think_s = think_times(num_requests, load, seeds["think"])
    requests = tuple(
        PlannedRequest(
            index=index,
            prompt_id=prompt.id,
            prompt=prompt.prompt,
            max_tokens=prompt.max_tokens,
            # 31 bits: the widest seed that every server of this API takes.
            seed=int.from_bytes(_block(f"{seeds['sampling']}/{index}")[:4], "big") >> 1,
            offset_s=offsets[index],
            think_s=think_s[index],
            is_chat=prompt.is_chat,
            messages=prompt.messages,
            user=prompt.user,
            priority=prompt.priority,
        )
        for index, prompt in enumerate(islice(cycle(prompts), num_requests))
    )
    entries = [entry_of(request) for request in requests]
    return Schedule(load, requests, seeds, schedule_digest(load, entries), draw=draw)


def schedule_digest(load: Load, entries: Iterable[tuple[int, str, int, int, float | None]]) -> str:
    """SHA-256 over canonical JSON of the load and (index, prompt id, max_tokens, seed, offset in s)."""
    content: dict[str, object] = {
        "arrivals": load.arrivals.value,
        "concurrency": None if load.is_open else load.concurrency,
        "rate": load.rate,
        "requests": [list(entry) for entry in entries],
    }
    if load.shape:
        content["shape"] = load.shape
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def salted_digest(digest: str, salt: str | None) -> str:
    return digest if salt is None else hashlib.sha256(f"{salt}/{digest}".encode()).hexdigest()


def _block(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
