"""How long a step takes, as a function of what it computes. Every model of time is one of these.

A cost model knows no clock and no batch, only five counts of a step and how long ago a prompt was computed.
All are in the step log, so that a model can be fitted to a log and asked about a plan.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

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


class CostModel(Protocol):
    """`since_prompt`: how many steps ago one had a prompt, 0 in such a step itself."""

    def step_s(self, work: StepWork, since_prompt: int = LONG_AGO) -> float: ...

    def decode_s(self, rows: int, contexts: range, since_prompt: int = LONG_AGO) -> list[float]:
        """Of steps without prompts, one after the other: to the last bit what `step_s` says of each.

        `since_prompt` is the first one's.
        """
        ...


@dataclass(frozen=True, slots=True)
class NullCost:
    """What the null backend waits, by its own formula."""

    fixed_s: float
    row_s: float
    prompt_token_s: float
    kind: Literal["null"] = "null"

    def step_s(self, work: StepWork, since_prompt: int = LONG_AGO) -> float:
        return self.fixed_s + self.row_s * work.rows + self.prompt_token_s * work.prompt_tokens

    def decode_s(self, rows: int, contexts: range, since_prompt: int = LONG_AGO) -> list[float]:
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
    cold_steps: int = 0
    """Over so many steps that goes back to 0, evenly."""
    kind: Literal["fitted"] = "fitted"

    def __post_init__(self) -> None:
        """Raises: ValueError, where a file says what no fit says."""
        if not self.knots or len(self.at_rows) != len(self.knots):
            raise ValueError("knots and at_rows must be of one length, and not empty")
        if any(left >= right for left, right in pairwise(self.knots)):
            raise ValueError("knots must rise")
        if self.cold_steps and len(self.cold_at_rows) != len(self.knots):
            raise ValueError("knots and cold_at_rows must be of one length")

    def step_s(self, work: StepWork, since_prompt: int = LONG_AGO) -> float:
        cost = self._of_rows(self.at_rows, work.rows) + self.decode_context_s * work.decode_context
        if work.prompt_tokens:
            cost += (
                self.prompt_step_s
                + self.prompt_token_s * work.prompt_tokens
                + self.prompt_chunk_s * work.prompt_chunks
                + self.prompt_context_s * work.prompt_context
            )
        elif since_prompt <= self.cold_steps:
            cost += self._cold_s(work.rows, since_prompt)
        return cost

    def decode_s(self, rows: int, contexts: range, since_prompt: int = LONG_AGO) -> list[float]:
        of_rows, context_s = self._of_rows(self.at_rows, rows), self.decode_context_s
        costs_s = [of_rows + context_s * context for context in contexts]
        for i in range(min(self.cold_steps + 1 - since_prompt, len(costs_s))):
            costs_s[i] += self._cold_s(rows, since_prompt + i)
        return costs_s

    def _cold_s(self, rows: int, since_prompt: int) -> float:
        return self._of_rows(self.cold_at_rows, rows) * float(cold_share(since_prompt, self.cold_steps))

    def _of_rows(self, values: tuple[float, ...], rows: int) -> float:
        knots = self.knots
        if len(knots) == 1:
            return values[0]
        right = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
        left = right - 1
        slope = (values[right] - values[left]) / (knots[right] - knots[left])
        return max(0.0, values[left] + slope * (rows - knots[left]))


def cold_share(since_prompt: Any, cold_steps: int) -> Any:
    """1 in the first step after one with a prompt, 0 after `cold_steps` of them."""
    return 1 - (since_prompt - 1) / cold_steps


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

    def step_s(self, work: StepWork, since_prompt: int = LONG_AGO) -> float:
        tokens = work.rows + work.prompt_tokens
        pairs = work.decode_context + work.prompt_context
        num_bytes = self.weight_bytes + self.kv_bytes_per_token * (work.decode_context + work.prompt_tokens)
        flops = 2 * self.num_parameters * tokens + self.attention_flops_per_pair * pairs
        return self.launch_s + max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def decode_s(self, rows: int, contexts: range, since_prompt: int = LONG_AGO) -> list[float]:
        return [self.step_s(StepWork(rows, 0, 0, context, 0)) for context in contexts]


@dataclass(frozen=True, slots=True)
class ScaledCost:
    """A machine that takes `scale` times as long for every step."""

    cost: CostModel
    scale: float

    def step_s(self, work: StepWork, since_prompt: int = LONG_AGO) -> float:
        return self.scale * self.cost.step_s(work, since_prompt)

    def decode_s(self, rows: int, contexts: range, since_prompt: int = LONG_AGO) -> list[float]:
        return [self.scale * cost_s for cost_s in self.cost.decode_s(rows, contexts, since_prompt)]


AnyCost = NullCost | FittedCost | RooflineCost
