"""A conversation as token ids, with whatever tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapters.text.tokenizer import Tokenizer


def chat_token_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]]) -> list[int]:
    return tokenizer.encode_batch([tokenizer.render_chat(messages)], add_special_tokens=False)[0]
