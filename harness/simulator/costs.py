"""How long a step takes, as a function of what it computes. Every model of time is one of these.

A cost model knows no clock and no batch, only five counts of a step and how many steps ago the engine
computed a prompt or was idle. All are in the step log, so that a model can be fitted to a log and asked about
a plan.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

from adapters.base import ScheduledChunk
from services.engine.step_plan import contexts


class StepWork(NamedTuple):
    """`rows`: decode rows and dead ones. Contexts are as in `StepRecord`."""

    rows: int
    prompt_tokens: int
    prompt_chunks: int
    decode_context: int
    prompt_context: int


def work_of(chunks: Sequence[ScheduledChunk], num_rows: int = 0, context: int = 0) -> StepWork:
    """Counted as the step log does it; beside the chunks there are `num_rows` rows of `context` together."""
    told = contexts(chunks)
    num_prompts = told["num_prompt_chunks"]
    own_rows = len(chunks) - num_prompts  # of one token each
    return StepWork(
        num_rows + own_rows,
        sum([chunk.num_tokens for chunk in chunks]) - own_rows,
        num_prompts,
        context + told["decode_context_tokens"],
        told["prompt_context_tokens"],
    )


LONG_AGO = 1 << 30
IDLE_S = 0.02
"""An engine without a step for so long was idle; between two steps of a batch pass less than 5 ms."""


class Since(NamedTuple):
    """How many steps ago one had a prompt, and one began after an idle time; 0 in such a step itself."""

    prompt: int = LONG_AGO
    idle: int = LONG_AGO

    def step(self, work: StepWork, *, is_after_idle: bool) -> Since:
        """Of the step that computes `work`, where this is of the step before."""
        return Since(0 if work.prompt_tokens else self.prompt + 1, 0 if is_after_idle else self.idle + 1)

    def later(self, num_steps: int) -> Since:
        """So many steps after this one, all without prompts."""
        return Since(self.prompt + num_steps, self.idle + num_steps)


_WARM = Since()


class CostModel(Protocol):
    def step_s(self, work: StepWork, since: Since = _WARM) -> float: ...

    def decode_s(self, rows: int, contexts: range, since: Since = _WARM) -> list[float]:
        """Of steps without prompts, one after the other: to the last bit what `step_s` says of each.

        `since` is the first one's.
        """
        ...


@dataclass(frozen=True, slots=True)
class NullCost:
    """What the null backend waits, by its own formula."""

    fixed_s: float
    row_s: float
    prompt_token_s: float
    kind: Literal["null"] = "null"

    def step_s(self, work: StepWork, since: Since = _WARM) -> float:
        return self.fixed_s + self.row_s * work.rows + self.prompt_token_s * work.prompt_tokens

    def decode_s(self, rows: int, contexts: range, since: Since = _WARM) -> list[float]:
        return [self.fixed_s + self.row_s * rows] * len(contexts)


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Piecewise linear in the rows, linear in everything else; seconds.

    `at_rows[i]` is the time of a step of `knots[i]` rows without prompts and without contexts. Beyond the
    last knot the last slope goes on.
    """

    knots: tuple[int, ...]
    at_rows: tuple[float, ...]
    prompt_step_s: float = 0.0
    """Added to a step that carries any prompt."""
    prompt_token_s: float = 0.0
    prompt_chunk_s: float = 0.0
    decode_context_s: float = 0.0
    prompt_context_s: float = 0.0
    cold_at_rows: tuple[float, ...] = ()
    """Added to the first step after one with a prompt, by knot: prompts push out of the caches what decode
    steps read."""
    idle_s: float = 0.0
    """Added to the first step after an idle time, with a prompt or without: others had the caches."""
    cooling_steps: float = 0.0
    """Both fall with the steps after that, to 37% (1/e) in so many."""
    kind: Literal["fitted"] = "fitted"

    def __post_init__(self) -> None:
        """Raises: ValueError, where a file says what no fit says."""
        if not self.knots or len(self.at_rows) != len(self.knots):
            raise ValueError("knots and at_rows must be of one length, and not empty")
        if any(left >= right for left, right in pairwise(self.knots)):
            raise ValueError("knots must rise")
        if self.cooling_steps and len(self.cold_at_rows) != len(self.knots):
            raise ValueError("knots and cold_at_rows must be of one length")
        if self.cold_at_rows and not self.cooling_steps:
            raise ValueError("cooling_steps is missing: an older version made this file, so make it again")

    def step_s(self, work: StepWork, since: Since = _WARM) -> float:
        cost = self._of_rows(self.at_rows, work.rows) + self.decode_context_s * work.decode_context
        if work.prompt_tokens:
            cost += (
                self.prompt_step_s
                + self.prompt_token_s * work.prompt_tokens
                + self.prompt_chunk_s * work.prompt_chunks
                + self.prompt_context_s * work.prompt_context
            )
        if min(since) <= self._cools_until:
            cost += self._cold_s(self._of_rows(self.cold_at_rows, work.rows), since)
        return cost

    def decode_s(self, rows: int, contexts: range, since: Since = _WARM) -> list[float]:
        of_rows, context_s = self._of_rows(self.at_rows, rows), self.decode_context_s
        costs_s = [of_rows + context_s * context for context in contexts]
        if (num_cold := self._cools_until + 1 - min(since)) > 0:
            cold_s = self._of_rows(self.cold_at_rows, rows)
            for i in range(min(len(costs_s), num_cold)):
                costs_s[i] += self._cold_s(cold_s, since.later(i))
        return costs_s

    @property
    def _cools_until(self) -> int:
        """The last step, counted from the prompt or the idle time, to which anything is added."""
        return math.ceil(warm_after(self.cooling_steps)) if self.cooling_steps else -1

    def _cold_s(self, first_s: float, since: Since) -> float:
        """`first_s` is what is added to a step of as many rows right after a prompt."""
        cold_s = self.idle_s * cold_share(since.idle, self.cooling_steps)
        return cold_s + first_s * cold_share(since.prompt - 1, self.cooling_steps) if since.prompt else cold_s

    def _of_rows(self, values: tuple[float, ...], rows: int) -> float:
        knots = self.knots
        if len(knots) == 1:
            return values[0]
        right = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
        left = right - 1
        slope = (values[right] - values[left]) / (knots[right] - knots[left])
        return max(0.0, values[left] + slope * (rows - knots[left]))


@lru_cache(maxsize=4096)
def cold_share(num_steps: int, cooling_steps: float) -> float:
    """1 at once, 1/e after `cooling_steps`, and nothing from `warm_after` on."""
    return math.exp(-num_steps / cooling_steps) if num_steps < warm_after(cooling_steps) else 0.0


def warm_after(cooling_steps: float) -> float:
    """In steps: what is added is below a hundredth by then."""
    return 5 * cooling_steps


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """What bandwidth and arithmetic allow at best: no measurement stands behind it.

    A step reads all weights once, the KV cache of its rows, and computes every token; the slower of memory
    and arithmetic decides. `launch_s` is what a step costs beside both.
    Source: the roofline model, Williams et al. (CACM 2009).
    """

    bytes_per_s: float
    flops_per_s: float
    weight_bytes: float
    num_parameters: float
    kv_bytes_per_token: float
    attention_flops_per_pair: float
    """Of one token that attends to one position, over all layers."""
    launch_s: float = 0.0
    kind: Literal["roofline"] = "roofline"

    def __post_init__(self) -> None:
        """Raises: ValueError, where nothing could ever be computed."""
        if self.bytes_per_s <= 0 or self.flops_per_s <= 0:
            raise ValueError("bytes_per_s and flops_per_s must be above 0")

    def step_s(self, work: StepWork, since: Since = _WARM) -> float:
        tokens = work.rows + work.prompt_tokens
        pairs = work.decode_context + work.prompt_context
        num_bytes = self.weight_bytes + self.kv_bytes_per_token * (work.decode_context + work.prompt_tokens)
        flops = 2 * self.num_parameters * tokens + self.attention_flops_per_pair * pairs
        return self.launch_s + max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def decode_s(self, rows: int, contexts: range, since: Since = _WARM) -> list[float]:
        return [self.step_s(StepWork(rows, 0, 0, context, 0)) for context in contexts]


@dataclass(frozen=True, slots=True)
class ScaledCost:
    """A machine that takes `scale` times as long for every step."""

    cost: CostModel
    scale: float

    def step_s(self, work: StepWork, since: Since = _WARM) -> float:
        return self.scale * self.cost.step_s(work, since)

    def decode_s(self, rows: int, contexts: range, since: Since = _WARM) -> list[float]:
        return [self.scale * cost_s for cost_s in self.cost.decode_s(rows, contexts, since)]


AnyCost = NullCost | FittedCost | RooflineCost
