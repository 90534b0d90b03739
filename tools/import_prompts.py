"""`lab import-prompts`: someone else's prompts as a corpus of ours.

The file is ShareGPT's JSON, OpenAI messages as JSON lines, or plain JSON lines with a prompt; the corpus has
the format of `data/prompts.jsonl`, its digest beside it. A conversation becomes its first human turn, system
messages before it. No tokenizer is at hand: the lengths of answers are told or estimated. Entries that
cannot be sent in all their parts (an image, say) are counted and named.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from adapters.base import ConfigError
from harness.plan.corpus import Prompt
from harness.plan.text_file import read_text, split_lines
from harness.plan.trace_formats import MAX_TOKENS
from tools.make_prompts import positive, write_corpus

CHARS_PER_TOKEN = 4
"""For `--max-tokens reply`: English text has about four characters a token."""

_PROMPT_FIELDS = {"conversations", "messages", "prompt", "text"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Exchange:
    """`max_tokens`: what the line itself asks for; `reply`: what was answered, where the file has it."""

    prompt: str | tuple[int, ...]
    """Text, or token ids."""
    reply: str | None = None
    max_tokens: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the corpus to write, as x.jsonl"
    )
    parser.add_argument("--n", type=positive, metavar="N", help="the first N prompts only")
    parser.add_argument(
        "--max-tokens",
        default="128",
        metavar="N|reply",
        help="budget of prompts that name none: a number (default 128), or the reply's own length, estimated",
    )


def run(args: argparse.Namespace) -> int:
    """Write the corpus and say what is in it.

    Raises:
        ConfigError: the file is not of a known kind or holds no prompt.
    """
    if args.out.suffix != ".jsonl":
        raise ConfigError(f"--out {args.out} must end in .jsonl: its digest goes beside it as .sha256")
    left_out: dict[int, str] = {}
    exchanges = list(islice(read_exchanges(args.file, left_out), args.n))
    stem = args.file.stem.encode(errors="replace").decode()  # a file name need not be UTF-8
    prompts = [
        Prompt(id=f"{stem}-{number}", prompt=e.prompt, max_tokens=_budget(e, args.max_tokens))
        for number, e in enumerate(exchanges)
    ]
    if not prompts:
        raise ConfigError(f"{args.file} holds no prompt")
    lines = [p.model_dump_json(include={"id", "prompt", "max_tokens"}) for p in prompts]
    content = ("\n".join(lines) + "\n").encode()
    write_corpus(args.out, content)
    print(f"{args.out}: {len(prompts)} prompts, {sum(p.max_tokens for p in prompts)} output tokens at most")
    if left_out:
        shown = ", ".join(islice(left_out.values(), _SHOWN)) + (", ..." if len(left_out) > _SHOWN else "")
        print(f"left out: {len(left_out)} entries of {args.file} hold no prompt: {shown}", file=sys.stderr)
    return 0


def read_exchanges(path: Path, left_out: dict[int, str]) -> Iterator[Exchange]:
    """All exchanges of a file, in its order. Entries that are no prompt, or not in all their parts, go to
    `left_out` by their numbers.

    Raises:
        ConfigError: as for `run`.
    """
    for number, item in enumerate(_items(path), start=1):
        if not isinstance(item, Mapping):
            raise ConfigError(f"{path}, entry {number}: an object is wanted, not {type(item).__name__}")
        body = item.get("body", item)  # batch files of the OpenAI API wrap what they ask
        if not isinstance(body, Mapping) or not (_PROMPT_FIELDS & set(body)):
            raise ConfigError(f"{path}, entry {number}: has no conversations, messages, prompt or text")
        exchanges = _exchanges(body)
        for exchange in exchanges:
            if exchange is None:
                left_out[number] = f"{number}" if len(exchanges) == 1 else f"{number} in part"
                continue
            if isinstance(exchange.prompt, str) and (half := _SURROGATE.search(exchange.prompt)):
                raise ConfigError(
                    f"{path}, entry {number}: its text holds half a character (\\u{ord(half[0]):04x}), which "
                    "no request can carry: mend or remove the entry"
                )
            yield exchange


def _items(path: Path) -> list[Any]:
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in split_lines(text) if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is neither a JSON list nor JSON lines: {error}") from error


def _exchanges(body: Mapping[str, Any]) -> list[Exchange | None]:
    """What one entry asks: one prompt, or each prompt of a list; None for what cannot be sent."""
    asked = (body.get(name) for name in ("max_tokens", "max_completion_tokens"))
    budget = next((n for n in asked if type(n) is int and n > 0), None)
    if budget is not None and budget > MAX_TOKENS:
        return [None]
    prompt = body.get("prompt", body.get("text"))
    if prompt is not None:
        reply = _text(body.get("completion") or body.get("response"))
        return [None if one is None else Exchange(one, reply, budget) for one in _prompts(prompt)]
    listed = body.get("conversations") or body.get("messages")
    turns = [
        (str(turn.get("from") or turn.get("role")), _text(turn.get("value", turn.get("content"))))
        for turn in (listed if isinstance(listed, list) else ())
        if isinstance(turn, Mapping)
    ]
    system = [words for who, words in turns if who == "system" and words]
    first = next(
        (i for i, (who, words) in enumerate(turns) if who in ("human", "user") and words != ""), None
    )
    if first is None or turns[first][1] is None:
        return [None]
    reply = next((words for who, words in turns[first + 1 :] if who in ("gpt", "assistant", "chatgpt")), None)
    asked_first = _prompts("\n\n".join([*system, turns[first][1] or ""]))
    return [None if one is None else Exchange(one, reply, budget) for one in asked_first]


def _prompts(prompt: Any) -> list[str | tuple[int, ...] | None]:
    """A text, a list of token ids, or a list of either, as the completions API takes them; else None."""
    if isinstance(prompt, str):
        return [prompt if prompt.strip() else None]
    if not isinstance(prompt, list) or not prompt:
        return [None]
    if all(type(part) is int for part in prompt):
        return [tuple(prompt) if min(prompt) >= 0 else None]
    return [one for part in prompt for one in _prompts(part)]


def _text(content: Any) -> str | None:
    """The text of a message, whose content may come in parts; None where not all of it is text."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def _budget(exchange: Exchange, asked: str) -> int:
    if exchange.max_tokens:
        return exchange.max_tokens
    if asked == "reply":
        return max(1, math.ceil(len(exchange.reply or "") / CHARS_PER_TOKEN))
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"--max-tokens must be a number above 0 or `reply`, not {asked!r}")
    return int(asked)
