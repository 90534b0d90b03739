"""Prompts that are made up in tokens: ids drawn for each, so that lengths are exact on every model.

No two prompts begin alike, so a prefix cache gains nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from adapters.base import ConfigError
from harness.plan.corpus import Corpus, Prompt
from harness.plan.draws import Draws

LOWEST_ID, NUM_IDS = 32, 95
"""Ids of plain characters in byte-level vocabularies, and somewhere inside every larger one."""


def synthetic_prompt(name: str, num_prompt_tokens: int, num_output_tokens: int, seed: int) -> Prompt:
    """Token ids drawn from the name and the seed."""
    draws = Draws(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big"))
    ids = tuple(LOWEST_ID + int(draws.uniform() * NUM_IDS) % NUM_IDS for _ in range(num_prompt_tokens))
    return Prompt(id=name, prompt=ids, max_tokens=num_output_tokens, category="synthetic")


def synthetic_corpus(spec: str, num_prompts: int, seed: int) -> Corpus:
    """`512x128`: prompts of 512 tokens with answers of 128.

    Raises:
        ConfigError: it is spelled otherwise.
    """
    lengths = spec.split("x")
    if len(lengths) != 2 or not all(part.isdecimal() and int(part) > 0 for part in lengths):
        raise ConfigError(
            f"CORPUS=synthetic:{spec}: write synthetic:PROMPTxOUTPUT in tokens, as synthetic:512x128"
        )
    num_prompt, num_output = map(int, lengths)
    prompts = tuple(
        synthetic_prompt(f"synthetic-{num_prompt}-{number}", num_prompt, num_output, seed)
        for number in range(num_prompts)
    )
    digest = hashlib.sha256(f"{spec}/{num_prompts}/{seed}".encode()).hexdigest()
    return Corpus(prompts, Path(f"synthetic:{spec}"), digest, digest)
