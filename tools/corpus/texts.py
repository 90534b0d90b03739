"""English prompts of a dozen kinds, put together from the phrases in `data/material.json`.

A prompt opens with a request and grows by whole sentences. Of several candidates the one nearest to the
wanted length is kept. Lengths are estimated from words and punctuation, so no tokenizer is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from adapters.data_files import DATA
from tools.corpus.lengths import Draws

MATERIAL_PATH = DATA / "material.json"
NUM_CANDIDATES = 8
TOKENS_PER_PIECE = 1.0
"""Tokens of the default model for each word or mark, measured over the whole corpus."""

_PIECE = re.compile(r"\w+|[^\w\s]|\n")
_SLOT = re.compile(r"\{(\w+)\}")
_FEW = ("two", "three", "four", "five", "six")
_NUMBERS = {
    "n": (3, 46), "percent": (2, 44), "amount": (12, 970), "day": (1, 28), "age": (24, 40),
    "year": (1850, 170), "recent": (1998, 27),
}  # fmt: skip
"""Slots for numbers: the least one, and how many values there are."""
_LISTS = {
    "thing": "things", "name": "names", "surname": "surnames", "city": "cities", "country": "countries",
    "company": "companies", "month": "months", "weekday": "weekdays", "team": "teams", "style": "styles",
    "voice": "voices", "language": "languages", "goal": "goals", "request": "requests",
    "concept": "concepts", "subject": "subjects", "lang": "langs", "task": "tasks", "products": "products",
}  # fmt: skip


def estimated_tokens(text: str) -> int:
    return round(len(_PIECE.findall(text)) * TOKENS_PER_PIECE)


def write_prompt(num_tokens: int, draws: Draws) -> tuple[str, str]:
    """A category that suits the length, and a prompt of about `num_tokens`."""
    fitting = [kind for kind in KINDS if kind.least <= num_tokens <= kind.most]
    ticket = draws.below(sum(kind.weight for kind in fitting))
    for kind in fitting:
        ticket -= kind.weight
        if ticket < 0:
            break
    candidates = [kind.write(num_tokens, draws) for _ in range(NUM_CANDIDATES)]
    return kind.category, min(candidates, key=lambda text: abs(estimated_tokens(text) - num_tokens))


@cache
def _material() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(MATERIAL_PATH.read_text("utf-8")))


def phrases(key: str) -> list[str]:
    return cast(list[str], _material()[key])


def topics() -> dict[str, list[str]]:
    return cast(dict[str, list[str]], _material()["topics"])


def fill(template: str, draws: Draws, own: Mapping[str, Sequence[str]] = {}) -> str:
    """Replace the slots. `{city2}` is another city than `{city}`, and drawn phrases may have slots.

    `own` has the values of slots that `material.json` does not know.
    """
    taken: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        slot = match[1]
        while slot not in taken:
            name = slot.rstrip("2")
            value = draws.choice(own[name]) if name in own else _value(name, draws)
            if value not in taken.values():
                taken[slot] = value
        return taken[slot]

    while _SLOT.search(template):
        template = _SLOT.sub(replace, template)
    return template


def _value(slot: str, draws: Draws) -> str:
    if slot in _NUMBERS:
        least, num = _NUMBERS[slot]
        return str(least + draws.below(num))
    if slot == "few":
        return draws.choice(_FEW)
    if slot == "topic":
        return draws.choice(list(topics()))
    return draws.choice(phrases(_LISTS[slot]))


def _sentences(key: str, num_tokens: int, draws: Draws) -> list[str]:
    """Filled phrases of about `num_tokens` in all; none comes again before all have been used."""
    chosen: list[str] = []
    pool: list[str] = []
    length = 0
    while True:
        pool = pool or draws.shuffled(phrases(key))
        sentence = fill(pool.pop(), draws)
        grown = length + estimated_tokens(sentence)
        if grown - num_tokens > num_tokens - length:  # stopping here is nearer
            return chosen
        chosen.append(sentence)
        length = grown


def _paragraphs(sentences: list[str], draws: Draws) -> str:
    parts: list[str] = []
    while sentences:
        size = 3 + draws.below(4)
        parts.append(" ".join(sentences[:size]))
        sentences = sentences[size:]
    return "\n\n".join(parts)


def _about_topics(num_tokens: int, draws: Draws) -> str:
    """Sentences on one subject in their order, and a further subject when the first is used up."""
    parts: list[str] = []
    for sentences in draws.shuffled(list(topics().values())):
        left = num_tokens - estimated_tokens("\n\n".join(parts))
        skipped = draws.below(3) if left < 150 else 0
        length, chosen = 0, []
        for sentence in sentences[skipped:]:
            grown = length + estimated_tokens(sentence)
            if grown - left > left - length:
                break
            chosen.append(sentence)
            length = grown
        if len(chosen) < 2 and parts:
            break
        parts.append(" ".join(chosen))
    return "\n\n".join(parts)


def _request(opening_key: str, detail_key: str) -> Callable[[int, Draws], str]:
    def write(num_tokens: int, draws: Draws) -> str:
        opening = fill(draws.choice(phrases(opening_key)), draws)
        details = _sentences(detail_key, num_tokens - estimated_tokens(opening), draws)
        return " ".join([opening, *details])

    return write


def _on_passage(opening_key: str) -> Callable[[int, Draws], str]:
    def write(num_tokens: int, draws: Draws) -> str:
        opening = fill(draws.choice(phrases(opening_key)), draws)
        left = num_tokens - estimated_tokens(opening) - 2
        if draws.below(2):
            return f"{opening}\n\n{_about_topics(left, draws)}".rstrip()
        return f"{opening}\n\n{_paragraphs(_sentences('reports', left, draws), draws)}".rstrip()

    return write


def _extract(num_tokens: int, draws: Draws) -> str:
    opening = draws.choice(phrases("extract"))
    reports = _sentences("reports", num_tokens - estimated_tokens(opening) - 2, draws)
    return f"{opening}\n\n{_paragraphs(reports, draws)}"


def _classify(num_tokens: int, draws: Draws) -> str:
    opening = draws.choice(phrases("classify"))
    reviews = _sentences("reviews", round((num_tokens - estimated_tokens(opening)) * 0.8), draws)
    return "\n".join([opening, "", *(f"{i}. {review}" for i, review in enumerate(reviews, 1))])


def _translate(num_tokens: int, draws: Draws) -> str:
    opening = fill(draws.choice(phrases("translate")), draws)
    return "\n".join(
        [opening, " ".join(_sentences("everyday", num_tokens - estimated_tokens(opening), draws))]
    ).rstrip()


def _chat(num_tokens: int, draws: Draws) -> str:
    situation = fill(draws.choice(phrases("situations")), draws)
    ask = fill(draws.choice(phrases("asks")), draws)
    left = num_tokens - estimated_tokens(situation) - estimated_tokens(ask)
    return " ".join([situation, *_sentences("feelings", left, draws), ask])


def _debug(num_tokens: int, draws: Draws) -> str:
    opening, code = fill(draws.choice(phrases("debug")), draws), draws.choice(phrases("snippets"))
    left = num_tokens - estimated_tokens(opening) - estimated_tokens(code)
    return "\n\n".join([opening, code, " ".join(_sentences("snippet_details", left, draws))]).rstrip()


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of prompt: how often it comes among those that fit, and the lengths it fits."""

    category: str
    weight: int
    least: int
    most: int
    write: Callable[[int, Draws], str]


KINDS = (
    Kind("question", 6, 1, 70, _request("questions", "question_details")),
    Kind("chat", 4, 24, 130, _chat),
    Kind("writing", 3, 8, 110, _request("write", "write_details")),
    Kind("brainstorm", 3, 8, 100, _request("brainstorm", "constraints")),
    Kind("code", 3, 10, 110, _request("code", "code_details")),
    Kind("code", 2, 35, 140, _debug),
    Kind("translation", 2, 10, 120, _translate),
    Kind("reasoning", 2, 24, 100, _request("problems", "problem_details")),
    Kind("summary", 4, 45, 512, _on_passage("summarise")),
    Kind("rewrite", 3, 40, 400, _on_passage("rewrite")),
    Kind("extraction", 2, 45, 512, _extract),
    Kind("classification", 2, 45, 400, _classify),
)
