"""`lab import-prompts`: someone else's prompts as a corpus of ours.

What enters is a file (ShareGPT's JSON, OpenAI messages as JSON lines, or plain JSON lines with a prompt);
what leaves is a corpus in the format of `data/prompts.jsonl` with its digest beside it. A conversation
becomes its first human turn, system messages before it. Knows no tokenizer: the lengths of answers are told
or estimated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base import ConfigError
from harness.plan.corpus import Prompt
from harness.results.output_dir import make_folder

CHARS_PER_TOKEN = 4
"""For `--max-tokens reply`: English text has about four characters a token."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """`max_tokens`: what the line itself asks for; `reply`: what was answered, where the file has it."""

    prompt: str
    reply: str | None = None
    max_tokens: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the corpus to write, as x.jsonl"
    )
    parser.add_argument("--n", type=int, metavar="N", help="the first N prompts only")
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
    exchanges = list(read_exchanges(args.file))[: args.n]
    prompts = [
        Prompt(id=f"{args.file.stem}-{number}", prompt=e.prompt, max_tokens=_budget(e, args.max_tokens))
        for number, e in enumerate(exchanges)
    ]
    if not prompts:
        raise ConfigError(f"{args.file} holds no prompt")
    lines = [p.model_dump_json(include={"id", "prompt", "max_tokens"}) for p in prompts]
    content = ("\n".join(lines) + "\n").encode()
    make_folder(args.out.parent)
    args.out.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    args.out.with_suffix(".sha256").write_text(f"{digest}  {args.out.name}\n", encoding="utf-8")
    print(f"{args.out}: {len(prompts)} prompts, {sum(p.max_tokens for p in prompts)} output tokens at most")
    return 0


def read_exchanges(path: Path) -> Iterator[Exchange]:
    """All exchanges of a file, in its order; conversations without a human turn are passed over.

    Raises:
        ConfigError: as for `run`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        items: Iterable[Any] = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except ValueError as error:
        raise ConfigError(f"{path} is neither a JSON list nor JSON lines: {error}") from error
    for number, item in enumerate(items, start=1):
        if not isinstance(item, Mapping):
            raise ConfigError(f"{path}, entry {number}: an object is wanted, not {type(item).__name__}")
        exchange = _exchange(item)
        if exchange is None and not ({"conversations", "messages", "prompt", "text"} & set(item)):
            raise ConfigError(f"{path}, entry {number}: has no conversations, messages, prompt or text")
        if exchange is not None and exchange.prompt.strip():
            yield exchange


def _exchange(item: Mapping[str, Any]) -> Exchange | None:
    body = item.get("body", item)  # batch files of the OpenAI API wrap what they ask
    budget = next(
        (body[n] for n in ("max_tokens", "max_completion_tokens") if isinstance(body.get(n), int)), None
    )
    if isinstance(body.get("prompt"), str):
        return Exchange(body["prompt"], _text(body.get("completion") or body.get("response")), budget)
    if isinstance(body.get("text"), str):
        return Exchange(body["text"], None, budget)
    turns = [
        (str(turn.get("from") or turn.get("role")), _text(turn.get("value") or turn.get("content")))
        for turn in body.get("conversations") or body.get("messages") or ()
    ]
    system = [words for who, words in turns if who == "system" and words]
    place = next((i for i, (who, words) in enumerate(turns) if who in ("human", "user") and words), None)
    if place is None:
        return None
    reply = next((words for who, words in turns[place + 1 :] if who in ("gpt", "assistant", "chatgpt")), None)
    return Exchange("\n\n".join([*system, turns[place][1] or ""]), reply, budget)


def _text(content: Any) -> str | None:
    """The text of a message, whose content may come in parts."""
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _budget(exchange: Exchange, asked: str) -> int:
    if exchange.max_tokens:
        return exchange.max_tokens
    if asked == "reply":
        return max(1, math.ceil(len(exchange.reply or "") / CHARS_PER_TOKEN))
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"--max-tokens must be a number above 0 or `reply`, not {asked!r}")
    return int(asked)
