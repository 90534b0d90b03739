"""How special tokens take part in the text of an answer.

Decoding leaves them out. A request may ask for them (`skip_special_tokens` false), and a stop string may
spell one. In that case the token has a mark in the text that is searched. No decoded text can hold a mark,
and none is ever shown: the text is the same as without it, and ends at the token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_FIRST_MARK, _LAST_MARK = 0xD800, 0xDFFF  # lone surrogates: UTF-8 has none
_HIDDEN = dict.fromkeys(range(_FIRST_MARK, _LAST_MARK + 1))


def without_marks(text: str) -> str:
    return text.translate(_HIDDEN)


def mark_special(
    stops: Sequence[str], special_tokens: Mapping[int, str]
) -> tuple[Sequence[str], Mapping[int, str]]:
    """Stop strings that match special tokens as well, and the mark of each token that they spell.

    The stop strings as they were stay among them: other tokens may spell the same text.
    """
    spelled = [(text, i) for i, text in special_tokens.items() if text and any(text in s for s in stops)]
    spelled = sorted(spelled, key=lambda pair: -len(pair[0]))[: _LAST_MARK - _FIRST_MARK]
    marks = {token_id: chr(_FIRST_MARK + number) for number, (_, token_id) in enumerate(spelled)}
    marked = []
    for stop in stops:
        for text, token_id in spelled:
            stop = stop.replace(text, marks[token_id])
        marked.append(stop)
    return [*stops, *(stop for stop in marked if stop not in stops)], marks
