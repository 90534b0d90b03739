"""How many requests a run has that nobody gave a number: enough to count, planned before it starts.

A slow machine measures for about 15 s. On a fast one requests count instead of seconds, and the corpus is
replayed again where it holds too few. The schedule's digest covers the number, so that such a run is repeated
with the REQUESTS that its file names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.plan.corpus import Corpus
from harness.settings import HarnessSettings

TARGET_S = 15.0
LONGEST_S = 25.0
"""A run is made long enough in requests where that takes no longer than this."""
ROUND_TO = 64
ENOUGH_REQUESTS, ENOUGH_ROUNDS = 300, 25


@dataclass(frozen=True, slots=True)
class Trial:
    """What one arm did before the comparison."""

    capacity: float
    """Requests a second of answers of the corpus's mean length, all users busy."""
    tokens_per_s: float
    """Of a closed loop of unequal answers."""
    start_s: float
    """What the service takes to start, to settle with its first requests, and to end."""
    warm_up_s: float
    """What a run takes beside its requests on a service that has started."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long one answer a user takes: its prompt, which weighs much in short answers, and each token."""

    begin_s: float
    token_s: float

    def seconds(self, num_tokens: float) -> float:
        return self.begin_s + num_tokens * self.token_s


def pace_of(short: tuple[float, float], longer: tuple[float, float]) -> Pace:
    """From two rounds, each its tokens an answer and its seconds. Where the second tells nothing new (answers
    that ended by themselves, a disturbed first round) all of its time counts as tokens'."""
    (few, few_s), (many, many_s) = short, longer
    if many <= few or many_s <= few_s:
        return Pace(0.0, many_s / max(many, 1))
    token_s = (many_s - few_s) / (many - few)
    return Pace(max(0.0, many_s - many * token_s), min(token_s, many_s / many))


def enough_requests(users: int) -> int:
    """A closed loop of so many requests is no short run, however soon a fast machine is done with it."""
    return max(ENOUGH_REQUESTS, ENOUGH_ROUNDS * users)


def sizes_itself(settings: HarnessSettings) -> bool:
    """Only a closed loop against a service of ours, sent from one place: a foreign server may cost money, and
    all parts of a split load must have one plan."""
    is_given = "requests" in settings.model_fields_set
    is_split = settings.which_shard()[1] > 1 or settings.start_at is not None
    is_plain = settings.rate is None and settings.trace is None and settings.url is None
    made_up = str(settings.corpus or "").startswith("synthetic:")
    return is_plain and not (is_given or is_split or made_up)


def mean_budget(corpus: Corpus) -> float:
    """Tokens of an answer."""
    return sum(prompt.max_tokens for prompt in corpus.prompts) / len(corpus.prompts)


def num_requests(tokens_per_s: float, corpus: Corpus, settings: HarnessSettings) -> int:
    """At least the default and four a user; at most the corpus once, or `enough_requests` if that is more."""
    requests_per_s = tokens_per_s / mean_budget(corpus)
    enough = enough_requests(settings.concurrency)
    wanted = math.ceil(TARGET_S * requests_per_s / ROUND_TO) * ROUND_TO
    if enough <= LONGEST_S * requests_per_s:
        wanted = max(wanted, enough)
    most = max(enough, len(corpus.prompts))
    return max(settings.requests, 4 * settings.concurrency, min(wanted, most))
