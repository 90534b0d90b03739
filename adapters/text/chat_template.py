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
    """One model's template, compiled. `special_tokens` are names such as `bos_token` with their text.

    A template that does not compile is kept with its problem: it stops chat, not completions.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._template: jinja2.Template | None = None
        self._problem = ""
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # whatever a foreign text makes of the compiler
            self._problem = _one_line(error)

    def render(
        self, messages: Sequence[Mapping[str, object]], options: Mapping[str, object] | None = None
    ) -> str:
        """The conversation as text, ending where the assistant is to go on; templates read `options`.

        Raises:
            ChatTemplateError: the template does not compile, refuses the messages (their roles or their
                order, say) or fails on them.
        """
        if self._template is None:
            raise ChatTemplateError(f"the model's chat template cannot be compiled: {self._problem}")
        try:
            given = {**(options or {}), **self._special_tokens}
            given |= {"messages": list(messages), "add_generation_prompt": True, "tools": None}
            return self._template.render(given)
        except Exception as error:  # a template is a program of somebody else's
            problem = _one_line(error)
            raise ChatTemplateError(f"the model's chat template refuses these messages: {problem}") from error


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


def _one_line(error: Exception) -> str:
    """The error's words, with its kind where they say nothing without it."""
    text = " ".join(str(error).split())
    return text if isinstance(error, jinja2.TemplateError) and text else f"{type(error).__name__}: {text}"


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

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """With the options, in the order, of transformers' own filter."""
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment.filters["tojson"] = to_json  # jinja2's own escapes for HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment
