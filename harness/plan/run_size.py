"""How many requests a run has that nobody gave a number: enough for about 15 s, planned before it starts.

The schedule's digest covers the number, so that such a run is repeated with the REQUESTS that its file names.
"""

from __future__ import annotations

import math

from harness.plan.corpus import Corpus
from harness.settings import HarnessSettings

TARGET_S = 15.0
ROUND_TO = 64


def sizes_itself(settings: HarnessSettings) -> bool:
    """Only a closed loop against a service of ours, sent from one place: a foreign server may cost money, and
    all parts of a split load must have one plan."""
    is_given = "requests" in settings.model_fields_set
    is_split = settings.which_shard()[1] > 1 or settings.start_at is not None
    is_plain = settings.rate is None and settings.trace is None and settings.url is None
    made_up = str(settings.corpus or "").startswith("synthetic:")
    return is_plain and not (is_given or is_split or made_up)


def num_requests(tokens_per_s: float, corpus: Corpus, settings: HarnessSettings) -> int:
    """At most the corpus once, so that nothing is sent twice; at least the default, and four a user."""
    mean_tokens = sum(prompt.max_tokens for prompt in corpus.prompts) / len(corpus.prompts)
    wanted = math.ceil(TARGET_S * tokens_per_s / mean_tokens / ROUND_TO) * ROUND_TO
    return max(settings.requests, 4 * settings.concurrency, min(wanted, len(corpus.prompts)))
