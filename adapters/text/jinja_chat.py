"""A chat template as jinja2 runs it: in its sandbox, with the functions and options of transformers.

It is called in the process of `adapters.text.render_process` alone, since a template may never end, and a
sandbox does not bound time or memory. Compiling computes constants, so it is done there as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapters.base import ChatTemplateError


def render(
    source: str,
    special_tokens: Mapping[str, str],
    messages: Sequence[Mapping[str, object]],
    options: Mapping[str, object],
) -> str:
    """Raises: ChatTemplateError: the template does not compile, refuses the messages or fails on them."""
    template = _compiled(source)
    try:
        given = {"documents": None, **options, **special_tokens}
        given |= {"messages": list(messages), "add_generation_prompt": True, "tools": None}
        return template.render(given)
    except Exception as error:  # a template is a program of somebody else's
        problem = _one_line(error)
        raise ChatTemplateError(f"the model's chat template refuses these messages: {problem}") from error


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except Exception as error:  # whatever a foreign text makes of the compiler
        problem = _one_line(error)
        raise ChatTemplateError(f"the model's chat template cannot be compiled: {problem}") from error


def _one_line(error: Exception) -> str:
    """The error's words, with its kind where they say nothing without it."""
    text = " ".join(str(error).split())
    return text if isinstance(error, jinja2.TemplateError) and text else f"{type(error).__name__}: {text}"


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
