"""The byte-level BPE tokenizer of a seeded preset.

The merges are learned from the corpus. Where these cannot fill the vocabulary, pairs of learned words do.
`encode` never yields such a pair, but a model of random weights does, and each must decode to some text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, both spelled the same on every machine."""
    vocab, merges = _train(texts, vocab_size)
    _fill(vocab, vocab_size)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END_OF_TEXT_ID, "content": END_OF_TEXT, **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", config)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_bytes((json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def _train(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[list[str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return dict(sorted(model["vocab"].items(), key=lambda item: item[1])), model["merges"]


def _fill(vocab: dict[str, int], vocab_size: int) -> None:
    """Add pairs of learned words, the most frequent words first, until the vocabulary is full."""
    parts = [token for token in vocab if len(token) > 3 and token[0] == "Ġ" and token[1:].isalpha()]
    parts = parts or [token for token in vocab if token != END_OF_TEXT]
    for rank in count():
        for first in range(rank + 1):
            for token in (parts[first] + parts[rank], parts[rank] + parts[first]):
                if len(vocab) >= vocab_size:
                    return
                if token not in vocab:
                    vocab[token] = len(vocab)
                    parts.append(token)  # a text of few words goes on with pairs of pairs
