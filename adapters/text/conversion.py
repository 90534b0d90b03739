"""Older tokenizer formats (SentencePiece, vocab + merges files) turned into a `tokenizers` object.

A module of its own, so that reading a usual folder never loads transformers.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from adapters.base import ConfigError


def convert_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Convert what the folder has.

    Raises:
        ConfigError: transformers is not installed, or it cannot convert this tokenizer.
    """
    no_json = f"{folder} has no tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError(
            f"{no_json}; install the torch extra to convert an older format, or take a model that has one"
        ) from None
    try:
        converted = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # whatever the format's own reader raises
        raise ConfigError(f"{no_json}, and reading what it has failed: {error}") from error
    fast = getattr(converted, "backend_tokenizer", None)
    if not isinstance(fast, tokenizers.Tokenizer):
        raise ConfigError(f"{no_json}, and its {type(converted).__name__} cannot be converted into one")
    return fast
