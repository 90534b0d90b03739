"""How long a step takes, as a function of what it computes. Every model of time is one of these.

A cost model knows no clock and no batch, only five counts of a step. The counts are those of the step log, so
that a model can be fitted to a log and asked about a plan.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
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


class CostModel(Protocol):
    def step_s(self, work: StepWork) -> float: ...

    def decode_s(self, rows: int, contexts: range) -> list[float]:
        """Of steps without prompts, one after the other: to the last bit what `step_s` says of each."""
        ...


@dataclass(frozen=True, slots=True)
class NullCost:
    """What the null backend waits, by its own formula."""

    fixed_s: float
    row_s: float
    prompt_token_s: float
    kind: Literal["null"] = "null"

    def step_s(self, work: StepWork) -> float:
        return self.fixed_s + self.row_s * work.rows + self.prompt_token_s * work.prompt_tokens

    def decode_s(self, rows: int, contexts: range) -> list[float]:
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
    kind: Literal["fitted"] = "fitted"

    def step_s(self, work: StepWork) -> float:
        cost = self._of_rows(work.rows) + self.decode_context_s * work.decode_context
        if work.prompt_tokens:
            cost += (
                self.prompt_step_s
                + self.prompt_token_s * work.prompt_tokens
                + self.prompt_chunk_s * work.prompt_chunks
                + self.prompt_context_s * work.prompt_context
            )
        return cost

    def decode_s(self, rows: int, contexts: range) -> list[float]:
        of_rows, context_s = self._of_rows(rows), self.decode_context_s
        return [of_rows + context_s * context for context in contexts]

    def _of_rows(self, rows: int) -> float:
        knots, values = self.knots, self.at_rows
        if len(knots) == 1:
            return values[0]
        right = min(max(bisect_right(knots, rows), 1), len(knots) - 1)
        left = right - 1
        slope = (values[right] - values[left]) / (knots[right] - knots[left])
        return max(0.0, values[left] + slope * (rows - knots[left]))


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

    def step_s(self, work: StepWork) -> float:
        tokens = work.rows + work.prompt_tokens
        pairs = work.decode_context + work.prompt_context
        num_bytes = self.weight_bytes + self.kv_bytes_per_token * (work.decode_context + work.prompt_tokens)
        flops = 2 * self.num_parameters * tokens + self.attention_flops_per_pair * pairs
        return self.launch_s + max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def decode_s(self, rows: int, contexts: range) -> list[float]:
        return [self.step_s(StepWork(rows, 0, 0, context, 0)) for context in contexts]


@dataclass(frozen=True, slots=True)
class ScaledCost:
    """A machine that takes `scale` times as long for every step."""

    cost: CostModel
    scale: float

    def step_s(self, work: StepWork) -> float:
        return self.scale * self.cost.step_s(work)

    def decode_s(self, rows: int, contexts: range) -> list[float]:
        return [self.scale * cost_s for cost_s in self.cost.decode_s(rows, contexts)]


AnyCost = NullCost | FittedCost | RooflineCost
