"""The byte-level BPE tokenizer of a seeded preset.

The merges are learned from the corpus. Where these cannot fill the vocabulary, pairs of learned words do.
`encode` never yields such a pair, but a model of random weights does, and each must decode to some text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
    write_byte_level_bpe(
        folder,
        vocab=vocab,
        merges=merges,
        special={END_OF_TEXT_ID: END_OF_TEXT},
        digits_alone=False,
        named={"bos": None, "eos": END_OF_TEXT, "pad": END_OF_TEXT, "unk": None},
        max_tokens=1_000_000,
        chat_template=CHAT_TEMPLATE,
    )


def write_byte_level_bpe(
    folder: Path,
    *,
    vocab: Mapping[str, int],
    merges: list[list[str]],
    special: Mapping[int, str],
    digits_alone: bool,
    named: Mapping[str, str | None],
    max_tokens: int,
    chat_template: str,
) -> None:
    """Write both files of a tokenizer that cuts text as GPT-2 does, `digits_alone` with each digit a word.

    `named`: the tokens that the configuration calls `bos_token` and the like.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}
        if digits_alone
        else byte_level,
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
        **{f"{name}_token": text for name, text in named.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "chat_template": chat_template,
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
