"""Text to token ids and back.

A model folder is read with the light `tokenizers` package, so that a process that only talks HTTP never loads
torch. `adapters.registry.load_tokenizer` knows which tokenizer a backend's model has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import tokenizers

from adapters.base import ConfigError
from adapters.text.chat_template import (
    ChatTemplate,
    ChatTemplateError,
    load_chat_template,
    render_chat,
    token_text,
)
from adapters.text.detokenizer import PieceDetokenizer, TokenStream, detokenizer_of
from adapters.text.unicode_text import valid_unicode

__all__ = [
    "ByteTokenizer",
    "ChatTemplateError",
    "HFTokenizer",
    "TokenStream",
    "Tokenizer",
    "least_num_tokens",
]


class Tokenizer(Protocol):
    """What the service needs of a tokenizer. Decoding reads ids as a continuation of earlier text."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def max_token_chars(self) -> int | None:
        """How much text a token holds at most; None where that cannot be told."""
        ...

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """The tokens that decoding leaves out of the text, as they are spelled."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, with the model's own first token where it wants one and may have it."""
        ...

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for many texts. A thread that calls it does not keep the others from running."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text these ids add after earlier text: special tokens left out, broken UTF-8 as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """What the token adds whatever stands before it; None where that depends on its neighbours."""
        ...

    def stream(self) -> TokenStream:
        """A fresh incremental `decode`."""
        ...

    def render_chat(
        self, messages: Sequence[Mapping[str, object]], options: Mapping[str, object] | None = None
    ) -> str:
        """The text of a conversation, special tokens spelled out, ending where the assistant is to go on.

        Templates read `options`.

        Raises:
            ChatTemplateError: the model has no chat template, or its template refuses the messages.
        """
        ...


def least_num_tokens(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> int:
    """How many tokens a prompt has at least, told from its length alone."""
    if not isinstance(prompt, str):
        return len(prompt)
    max_chars = tokenizer.max_token_chars
    return 1 if max_chars is None else -(-len(prompt) // max_chars)


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 ends the answer. For the null backend, which has no model."""

    vocab_size = 257
    eos_token_ids: tuple[int, ...] = (256,)
    max_token_chars: int | None = 1
    special_tokens: Mapping[int, str] = MappingProxyType({})

    def __init__(self) -> None:
        self._detokenizer = PieceDetokenizer({**{i: bytes([i]) for i in range(256)}, 256: b""})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(valid_unicode(text).encode())

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._detokenizer.decode(token_ids)

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._detokenizer.token_bytes(token_id)

    def stream(self) -> TokenStream:
        return self._detokenizer.stream()

    def render_chat(
        self, messages: Sequence[Mapping[str, object]], options: Mapping[str, object] | None = None
    ) -> str:
        lines = [f"{message.get('role')}: {message.get('content')}" for message in messages]
        return "\n".join([*lines, "assistant: "])


class HFTokenizer:
    """A Hugging Face tokenizer. Use `from_folder`."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        tokenizer.no_truncation()  # a tokenizer.json may carry both; silently cut prompts are wrong prompts
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer_of(tokenizer)
        self._chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = _max_token_chars(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {i: token.content for i, token in added.items() if token.special}

    @classmethod
    def from_folder(cls, folder: Path) -> HFTokenizer:
        """Read `tokenizer.json` and the small JSON files beside it.

        Raises:
            ConfigError: the folder holds no tokenizer that can be read.
        """
        tokenizer = _read_tokenizer(folder)
        config = _read_json(folder / "tokenizer_config.json")
        return cls(tokenizer, _eos_token_ids(folder, tokenizer, config), load_chat_template(folder, config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        # The package's `encode` holds the interpreter's lock for as long as it takes; this does not. One text
        # a call: an encoding takes a hundred bytes a token until its ids are taken out.
        encode = self._tokenizer.encode_batch_fast
        return [encode([valid_unicode(text)], add_special_tokens=add_special_tokens)[0].ids for text in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._detokenizer.decode(token_ids)

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._detokenizer.token_bytes(token_id)

    def stream(self) -> TokenStream:
        return self._detokenizer.stream()

    def render_chat(
        self, messages: Sequence[Mapping[str, object]], options: Mapping[str, object] | None = None
    ) -> str:
        return render_chat(self._chat_template, messages, options)


def _max_token_chars(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Where every byte of a text is spelled by one character of a token; None where text may shrink first."""
    is_byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
    shrinks_to = _shrink(tokenizer.normalizer) if is_byte_level or _falls_back_to_bytes(tokenizer) else None
    added = tokenizer.get_added_tokens_decoder().values()
    if shrinks_to is None or any(token.lstrip or token.rstrip for token in added):  # such take the spaces
        return None
    return shrinks_to * max(map(len, tokenizer.get_vocab(with_added_tokens=True)))


def _falls_back_to_bytes(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether text without a token of its own becomes its bytes; else a run of it may be one token."""
    if not getattr(tokenizer.model, "byte_fallback", False) or tokenizer.pre_tokenizer is not None:
        return False
    return all(tokenizer.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))


def _shrink(normalizer: Any) -> int | None:
    """How many characters a normalizer makes one of at most; None where it may drop any number of them."""
    if normalizer is None:
        return 1
    state: dict[str, Any] = json.loads(normalizer.__getstate__())
    most = 1
    for step in state["normalizers"] if state["type"] == "Sequence" else [state]:
        match step:
            case {"type": "NFC" | "NFKC"}:
                most *= 4  # the longest canonical decomposition of a character
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(old) <= len(
                new
            ):
                pass
            case _:
                return None
    return most


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises plain Exception
            raise ConfigError(f"{file} cannot be read as a tokenizer: {error}") from error
    from adapters.text.conversion import convert_tokenizer

    return convert_tokenizer(folder)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return cast(dict[str, Any], json.loads(file.read_text("utf-8")))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error


def _eos_token_ids(
    folder: Path, tokenizer: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any]
) -> tuple[int, ...]:
    """Every id that ends an answer: chat models name further ones in `generation_config.json`."""
    listed = _read_json(folder / "generation_config.json").get("eos_token_id")
    if listed is None:
        listed = _read_json(folder / "config.json").get("eos_token_id")
    ids: list[int] = listed if isinstance(listed, list) else [] if listed is None else [listed]
    text = token_text(tokenizer_config.get("eos_token"))
    own = None if text is None else tokenizer.token_to_id(text)
    return tuple(dict.fromkeys([*ids, own] if own is not None else ids))
