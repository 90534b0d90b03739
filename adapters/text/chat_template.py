"""Chat messages to the prompt text that a model was trained on, special tokens spelled out.

Templates come with the model and are not trusted: they run in jinja2's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapters.base import LabError


class ChatTemplateError(LabError):
    """The model has no chat template, or its template refuses these messages."""


class ChatTemplate:
    """One model's template, compiled. `special_tokens` are names such as `bos_token` with their text."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The conversation as text, ending where the assistant is to go on.

        Raises:
            ChatTemplateError: the template refuses the messages (their roles or their order, say).
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, tools=None, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error


def load_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template in `chat_template.jinja`, else in `tokenizer_config.json`, else None."""
    file = folder / "chat_template.jinja"
    source = file.read_text("utf-8") if file.is_file() else tokenizer_config.get("chat_template")
    if isinstance(source, list):  # several named ones
        by_name = {entry["name"]: entry["template"] for entry in source}
        source = by_name.get("default")
    if not source:
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: text for name in names if (text := token_text(tokenizer_config.get(name))) is not None}
    return ChatTemplate(source, special)


def token_text(token: object) -> str | None:
    """A token as `tokenizer_config.json` may write it: a string, an object with its content, or null."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant says, for training; here its content is just text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: object, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    def now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment.filters["tojson"] = to_json  # jinja2's own escapes for HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment
