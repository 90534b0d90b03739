"""The tokenizer and chat template inside a GGUF file, for files that come without a Hugging Face folder.

llama.cpp loads the vocabulary without the weights and does the encoding; decoding is a table of bytes per
token, as for other models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import llama_cpp.llama_cpp as C

from adapters.base import ConfigError
from adapters.llama_cpp_backend.loading import LlamaModel, load_model
from adapters.text.chat_template import ChatTemplate, render_chat
from adapters.text.detokenizer import PieceDetokenizer, TokenStream
from adapters.text.unicode_text import valid_unicode

_TEMPLATE_KEY = "tokenizer.chat_template"


class GgufTokenizer:
    """Use `from_file`. The vocabulary stays loaded as long as the object lives."""

    max_token_chars = None

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._vocab = model.vocab
        self._detokenizer = PieceDetokenizer(_Pieces(self._piece))
        self.vocab_size: int = C.llama_vocab_n_tokens(self._vocab)
        self.eos_token_ids = model.eos_token_ids
        template = model.metadata(_TEMPLATE_KEY)
        self._chat_template = None if not template else ChatTemplate(template, self._named_tokens())

    @classmethod
    def from_file(cls, path: Path) -> GgufTokenizer:
        """Read the tokenizer of a GGUF file.

        Raises:
            ConfigError: the file has none.
            BackendError: llama.cpp cannot read it.
        """
        model = load_model(path, vocab_only=True)
        if C.llama_vocab_type(model.vocab) == C.LLAMA_VOCAB_TYPE_NONE:
            raise ConfigError(f"{path} holds no tokenizer; give MODEL a file that does")
        return cls(model)

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        control = [
            i
            for i in range(self.vocab_size)
            if C.llama_vocab_get_attr(self._vocab, i) & C.LLAMA_TOKEN_ATTR_CONTROL
        ]
        return {i: self._text(i) for i in control}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenize(text, add_special=add_special_tokens)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self._tokenize(text, add_special=add_special_tokens) for text in texts]

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

    def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Special tokens that are spelled out in the text count as such, as they do with Hugging Face's."""
        data = valid_unicode(text).encode()
        room = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            num = C.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, True)
            if num >= 0:
                return tokens[:num]
            room = -num

    def _piece(self, token_id: int) -> bytes:
        """The bytes that a token adds to text; none for a special one."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            num = C.llama_token_to_piece(self._vocab, token_id, buffer, room, 0, False)
            if num >= 0:
                return buffer.raw[:num]
            room = -num

    def _named_tokens(self) -> dict[str, str]:
        ids = {"bos_token": C.llama_vocab_bos(self._vocab), "eos_token": C.llama_vocab_eos(self._vocab)}
        return {name: self._text(token_id) for name, token_id in ids.items() if token_id >= 0}

    def _text(self, token_id: int) -> str:
        text: str = C.llama_vocab_get_text(self._vocab, token_id).decode("utf-8", "replace")
        return text


class _Pieces(dict[int, bytes]):
    """Token id to bytes, filled as ids turn up."""

    def __init__(self, piece_of: Callable[[int], bytes]) -> None:
        super().__init__()
        self._piece_of = piece_of

    def __missing__(self, token_id: int) -> bytes:
        piece = self[token_id] = self._piece_of(token_id)
        return piece
