"""Token ids to text, all at once or as they come.

Nearly every causal LM has a decoder that gives each token fixed bytes. A stream is then a table look-up and
an incremental UTF-8 decoder: text once emitted never changes, and half a character is never emitted. The few
others (WordPiece, `</w>` suffixes) are decoded over a short sliding window. The ids are read as the
continuation of a prompt, so a leading space is kept.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenStream(Protocol):
    """One answer being decoded. All pushes and the flush joined are what `decode` gives for all ids."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next ids; return the text that is now certain, which may be empty."""
        ...

    def flush(self) -> str:
        """Return what was held back, a cut character as U+FFFD; the stream is spent afterwards."""
        ...


class SpelledStream:
    """A stream in which tokens that are left out of the text get a text after all, each its own."""

    def __init__(self, stream: TokenStream, spelled: Mapping[int, str]) -> None:
        self._stream = stream
        self._spelled = spelled

    def push(self, token_ids: Sequence[int]) -> str:
        spelled = self._spelled
        return "".join([spelled[i] if i in spelled else self._stream.push([i]) for i in token_ids])

    def flush(self) -> str:
        return self._stream.flush()


class Detokenizer(Protocol):
    def decode(self, token_ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes | None: ...

    def stream(self) -> TokenStream: ...


class PieceDetokenizer:
    """For decoders in which a token's bytes depend on nothing but the token."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces

    def decode(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        return b"".join([pieces[i] for i in token_ids]).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._pieces[token_id]

    def stream(self) -> TokenStream:
        return _PieceStream(self._pieces)


class _PieceStream:
    __slots__ = ("_pieces", "_utf8")

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        return self._utf8.decode(b"".join([pieces[i] for i in token_ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class WindowDetokenizer:
    """For decoders that look at neighbours: text is the difference of two decodes of the last few ids."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids)

    def token_bytes(self, token_id: int) -> bytes | None:
        return None

    def stream(self) -> TokenStream:
        return _WindowStream(self._decode)


class _WindowStream:
    """`_window` starts with the ids whose text went out last; they give the new ones their context."""

    __slots__ = ("_decode", "_num_emitted", "_window")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_emitted = 0

    def push(self, token_ids: Sequence[int]) -> str:
        self._window.extend(token_ids)
        old, new = self._decode(self._window[: self._num_emitted]), self._decode(self._window)
        if len(new) <= len(old) or new.endswith("�") or not new.startswith(old):
            return ""
        self._window = self._window[self._num_emitted :]
        self._num_emitted = len(self._window)
        return new[len(old) :]

    def flush(self) -> str:
        old, new = self._decode(self._window[: self._num_emitted]), self._decode(self._window)
        self._window, self._num_emitted = [], 0
        num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
        return new[num_same:]


def detokenizer_of(tokenizer: tokenizers.Tokenizer) -> Detokenizer:
    """The cheapest exact way to decode with this tokenizer; special tokens are left out of the text."""
    to_bytes = _piece_rule(tokenizer)
    if to_bytes is None:
        return WindowDetokenizer(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True))
    return PieceDetokenizer(_Pieces(tokenizer, to_bytes))


class _Pieces(dict[int, bytes]):
    """Token id to bytes, filled as ids turn up; special and unknown ids are empty."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, to_bytes: Callable[[str], bytes]) -> None:
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        added = tokenizer.get_added_tokens_decoder()
        super().__init__({i: b"" for i, token in added.items() if token.special})

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        piece = b"" if token is None else self._to_bytes(token)
        self[token_id] = piece
        return piece


def _piece_rule(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes] | None:
    """How a token's spelling becomes bytes, or None where that depends on its neighbours."""
    decoder = tokenizer.decoder
    if decoder is None:
        return None
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
    if kinds == ["ByteLevel"]:
        return _byte_level
    replaced: list[tuple[str, str]] = []
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(old) == 1:
                replaced.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                replaced.append((old, " "))
            case {"type": "Strip", "content": " ", "stop": 0} if "Fuse" in [s["type"] for s in steps]:
                pass  # takes off the space before the first word, which a continuation needs
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                return None
    has_byte_tokens = "ByteFallback" in kinds

    def spelled(token: str) -> bytes:
        if has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return spelled


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, to that byte.

    Source: GPT-2's encoder: printable Latin-1 bytes stand for themselves, the others follow from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token, spelled as it is
        return token.encode()
