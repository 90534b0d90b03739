"""Chat messages to the prompt text that a model was trained on, special tokens spelled out.

Templates come with the model and are not trusted: they run in jinja2's sandbox, in a process that can be
ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.base import ChatTemplateError
from adapters.text.render_process import RENDERER

__all__ = ["ChatTemplate", "ChatTemplateError", "load_chat_template", "render_chat", "token_text"]


class ChatTemplate:
    """One model's template. `special_tokens` are names such as `bos_token` with their text.

    A template that does not compile is found out when it is used: it stops chat, not completions.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, object]], options: Mapping[str, object] | None = None
    ) -> str:
        """The conversation as text, ending where the assistant is to go on; templates read `options`.

        Blocks for as long as the template takes, without the interpreter's lock.

        Raises:
            ChatTemplateError: the template does not compile, refuses the messages (their roles or their
                order, say), fails on them, or takes too much time or memory.
        """
        return RENDERER.render(self._source, self._special_tokens, messages, options or {})


def render_chat(
    template: ChatTemplate | None,
    messages: Sequence[Mapping[str, object]],
    options: Mapping[str, object] | None,
) -> str:
    """`template.render`. Raises: ChatTemplateError, also where there is no template."""
    if template is None:
        raise ChatTemplateError("this model has no chat template; send a prompt to /v1/completions")
    return template.render(messages, options)


def load_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template in `chat_template.jinja`, else in `tokenizer_config.json`, else None."""
    file = folder / "chat_template.jinja"
    source: object = tokenizer_config.get("chat_template")
    if file.is_file():
        source = file.read_text("utf-8", errors="replace")
    if isinstance(source, list):  # several named ones
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = by_name.get("default")
    if not isinstance(source, str) or not source:
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: text for name in names if (text := token_text(tokenizer_config.get(name))) is not None}
    return ChatTemplate(source, special)


def token_text(token: object) -> str | None:
    """A token as `tokenizer_config.json` may write it: a string, an object with its content, or null."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
