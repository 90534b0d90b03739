"""Prompts that are made up in tokens: ids drawn for each, so that lengths are exact on every model.

No two prompts begin alike, so a prefix cache gains nothing, unless a common beginning is asked for.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from adapters.base import ConfigError
from harness.plan.corpus import Corpus, Prompt
from harness.plan.draws import Draws

LOWEST_ID, NUM_IDS = 32, 95
"""Ids of plain characters in byte-level vocabularies, and somewhere inside every larger one."""


def synthetic_ids(name: str, num_tokens: int, seed: int) -> tuple[int, ...]:
    """Token ids drawn from the name and the seed."""
    draws = Draws(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big"))
    return tuple(LOWEST_ID + int(draws.uniform() * NUM_IDS) % NUM_IDS for _ in range(num_tokens))


def synthetic_prompt(
    name: str, num_own_tokens: int, num_output_tokens: int, seed: int, begins: tuple[int, ...] = ()
) -> Prompt:
    """One that `begins` so, and whose own token ids are drawn from the name and the seed."""
    ids = begins + synthetic_ids(name, num_own_tokens, seed)
    return Prompt(id=name, prompt=ids, max_tokens=num_output_tokens, category="synthetic")


def synthetic_corpus(spec: str, num_prompts: int, seed: int) -> Corpus:
    """`512x128`: prompts of 512 tokens with answers of 128; `384+128x128`: the first 384 are the same in all.

    Raises:
        ConfigError: it is spelled otherwise.
    """
    match = re.fullmatch(r"(?:(\d+)\+)?(\d+)x(\d+)", spec, re.ASCII)
    num_shared, num_own, num_output = map(int, match.groups(default="0")) if match else (0, 0, 0)
    if not num_own or not num_output:
        raise ConfigError(
            f"CORPUS=synthetic:{spec}: write synthetic:PROMPTxOUTPUT in tokens, as synthetic:512x128, or "
            "synthetic:COMMON+OWNxOUTPUT for prompts that begin alike, as synthetic:384+128x128"
        )
    shared = synthetic_ids("synthetic-common", num_shared, seed)
    prompts = tuple(
        synthetic_prompt(f"synthetic-{num_own}-{number}", num_own, num_output, seed, shared)
        for number in range(num_prompts)
    )
    digest = hashlib.sha256(f"{spec}/{num_prompts}/{seed}".encode()).hexdigest()
    return Corpus(prompts, Path(f"synthetic:{spec}"), digest, digest)
