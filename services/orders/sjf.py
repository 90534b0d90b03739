"""Shortest job first: the fewest predicted output tokens, with aging, so that a long answer starts some day.

`AGING_S` seconds of waiting are worth 128 predicted tokens. A group of `p` predicted tokens is overtaken
only by groups that arrive less than `p / 128 * AGING_S` after it. With AGING_S=0 nothing ages: the shortest
is always first, and a long answer may wait without end. Priorities are not looked at.

Source: predicted lengths as the key, Qiu et al., "Efficient Interactive LLM Serving with Proxy Model-based
Sequence Length Prediction" (arXiv 2404.08509).
"""

from __future__ import annotations

from typing import ClassVar

from services.orders.base import Group, OrderConfig, predicted_tokens

_TOKENS_OF_AGING_S = 128


class Sjf:
    name: ClassVar[str] = "sjf"

    def __init__(self, config: OrderConfig) -> None:
        self._aging_s = config.aging_s

    def sort_key(self, group: Group) -> float:
        if not self._aging_s:
            return predicted_tokens(group)
        return group[0].arrival_s + predicted_tokens(group) / _TOKENS_OF_AGING_S * self._aging_s
