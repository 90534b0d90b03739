"""Requests before the measured ones, so that these meet a server that has settled.

Their prompts share no text with any corpus, so a prefix cache learns nothing, and no seed with the measured
schedule. Their budgets are staggered: a batch shrinks from its largest size to one, and every batch size is
seen. No file holds their rows.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

from harness.plan.corpus import Prompt
from harness.plan.salt import with_salted_prompts
from harness.plan.schedule import Arrivals, Load, PlannedRequest, Schedule, derive_seed, schedule_digest

WARMUP_SEED = 20_260_101
FEWEST_TOKENS = 2


def make_warmup(
    num_requests: int, max_tokens: int | Sequence[int] | None = None, users: int | None = None
) -> Schedule:
    """Number i with a budget of i + 2 tokens, or all with the budget or budgets given; all requests at once
    unless fewer `users` send them."""
    seed = derive_seed(WARMUP_SEED, "warmup")
    load = Load(Arrivals.CLOSED, concurrency=users or num_requests)
    if max_tokens is None or isinstance(max_tokens, int):
        max_tokens = [max_tokens or FEWEST_TOKENS + index for index in range(num_requests)]
    requests = tuple(
        PlannedRequest(
            index=index,
            prompt_id=f"warmup-{index}",
            prompt=f"{index} warm-up " + "count " * (4 + 4 * (index % load.concurrency)),
            max_tokens=max_tokens[index],
            seed=(seed + index) % 2**31,
        )
        for index in range(num_requests)
    )
    entries = [(r.index, r.prompt_id, r.max_tokens, r.seed, r.offset_s) for r in requests]
    return Schedule(load, requests, {"warmup": seed}, schedule_digest(load, entries))


def make_trial(
    prompts: Sequence[Prompt], max_tokens: int | Sequence[int], num_requests: int, users: int
) -> Schedule:
    """As `make_warmup`, with the first of these prompts, each behind a number that no cache has seen."""
    plain = make_warmup(num_requests, max_tokens, users)
    asked = tuple(
        replace(request, prompt=prompt.prompt, messages=prompt.messages)
        for request, prompt in zip(plain.requests, cycle(prompts), strict=False)
    )
    return with_salted_prompts(replace(plain, requests=asked, salt=secrets.token_hex(8)), 0)
