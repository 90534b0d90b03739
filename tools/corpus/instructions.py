"""Instructions and short chats that a small model can answer, put together as `texts` does it.

Their phrases are in `data/instructions_material.json`; names, cities and the like come from `material.json`.
Answers are to end where the model ends them, so the budget of each is a cap and the same for all.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, cast

from adapters.data_files import DATA
from tools.corpus.lengths import Draws
from tools.corpus.texts import fill, phrases, topics

INSTRUCTIONS_PATH = DATA / "instructions_material.json"
MAX_TOKENS = 256
_MOST_SENTENCES = 4
_TURN = "\x1e"
KINDS = {
    "question": 5, "list": 3, "chat": 4, "writing": 3, "code": 3, "arithmetic": 2, "summary": 2,
    "rewrite": 2, "classification": 2, "translation": 2, "languages": 2, "emoji": 2,
}  # fmt: skip
"""How often each kind comes."""


DIALOGUES_OF_CHATS = 3, 4
"""So many of the chats have several turns."""


@cache
def _material() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(INSTRUCTIONS_PATH.read_text("utf-8")))


def write_instruction(draws: Draws) -> tuple[str, list[str]]:
    """A kind and the turns of a chat, the first and the last of them the user's; most have one."""
    kind = draws.choice([kind for kind, weight in KINDS.items() for _ in range(weight)])
    own = {
        "emoji": _material()["emojis"],
        "foreign": _material()["foreign"],
        "code_task": _material()["code_tasks"],
        "sql_table": _material()["sql_tables"],
        "regex": _material()["regexes"],
        "minute": _material()["minutes"],
        "review": phrases("reviews"),
        "passage": [_passage(draws)],
    }
    text = draws.choice(_material()[kind])
    some, of = DIALOGUES_OF_CHATS
    if kind == "chat" and draws.below(of) < some:
        # Joined while they are filled: a name of the first turn is the same in the last.
        text = _TURN.join(draws.choice(_material()["dialogues"]))
    return kind, fill(text, draws, own).split(_TURN)


def _passage(draws: Draws) -> str:
    """Some sentences in a row on one subject."""
    sentences = draws.choice(list(topics().values()))
    first = draws.below(len(sentences) - _MOST_SENTENCES + 1)
    return " ".join(sentences[first : first + 2 + draws.below(_MOST_SENTENCES - 1)])
