"""A number in front of each prompt that a foreign server gets, so that its prefix cache knows none of them.

The first characters already differ, in every run, under every load, in every repeat and between the requests
of one run: a corpus that is sent again costs what it cost the first time.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import replace

from harness.plan.schedule import PlannedRequest, Schedule
from harness.plan.synthetic import LOWEST_ID, NUM_IDS
from harness.settings import HarnessSettings

NUM_DIGITS = 9
NUM_SALTED_IDS = 8


def choose_salt(settings: HarnessSettings, *, is_foreign: bool) -> str | None:
    """The one given, else a new one where the server is not ours; None sends prompts as they are.

    Shards of one run share theirs: they have no instant in common but START_AT, and none without it.
    """
    if settings.salt is not None:
        return None if settings.salt == "0" else settings.salt
    if not is_foreign:
        return None
    if settings.which_shard()[1] > 1:
        return None if settings.start_at is None else f"{settings.start_at:.3f}"
    return secrets.token_hex(8)


def with_salted_prompts(schedule: Schedule, repeat: int) -> Schedule:
    """What is sent in one repeat; the digest is that of all repeats."""
    if schedule.salt is None:
        return schedule
    salted = tuple(_salted(request, f"{schedule.salt}/{repeat}") for request in schedule.requests)
    return replace(schedule, requests=salted)


def _salted(request: PlannedRequest, salt: str) -> PlannedRequest:
    drawn = hashlib.sha256(f"{salt}/{request.index}".encode()).digest()
    # Digits are as many tokens in every prompt, or nearly.
    number = f"{int.from_bytes(drawn[:8], 'big') % 10**NUM_DIGITS:0{NUM_DIGITS}d} "
    if request.messages:
        first, *later = request.messages
        first = first.model_copy(update={"content": number + first.content})
        return replace(request, messages=(first, *later))
    if isinstance(request.prompt, str):
        return replace(request, prompt=number + request.prompt)
    # Ids take the place of the first ones, since lengths are exact.
    ids = [LOWEST_ID + byte % NUM_IDS for byte in drawn[: min(NUM_SALTED_IDS, len(request.prompt))]]
    return replace(request, prompt=(*ids, *request.prompt[len(ids) :]))
