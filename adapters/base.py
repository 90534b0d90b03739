"""The nouns that every backend and every strategy shares.

Nothing here knows HTTP, asyncio, torch or the strategy, and nothing of the project is imported.

Errors::

    LabError
     +-- ConfigError        a setting or a model name that cannot work; the message says what to change
     +-- BackendError       the model failed while loading or running
     |    +-- UnsupportedModel   this architecture cannot be run by this backend
     +-- CapacityError      no room now; trying again later can work
     +-- RequestTooLong     can never fit; trying again cannot work
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol, TypeVar, runtime_checkable

OptionsT = TypeVar("OptionsT")
FinishReason = Literal["stop", "length", "abort", "error"]
Scheduling = Literal["lab", "engine"]
"""Who decides what a step carries: a strategy of the lab, or the engine itself."""


class LabError(Exception):
    """Root of every error that the lab raises on purpose."""


class ConfigError(LabError):
    """A setting or a model name that cannot work."""


class BackendError(LabError):
    """The model failed while loading or running."""


class UnsupportedModel(BackendError):
    """This architecture cannot be run by this backend."""


class ChatTemplateError(LabError):
    """The model has no chat template, or its template refuses these messages."""


class CapacityError(LabError):
    """No room now; trying again later can work."""


class RequestTooLong(LabError):
    """The request can never fit, however long it waits."""


class SequenceState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDING = "ending"
    """A launched step gives its last token; it computes no more."""
    FINISHED = "finished"


KV_BLOCK = 16
"""Positions of a block of keys and values."""
LEAST_TEMPERATURE = 1e-5
"""Dividing by less overflows, and nothing but the likeliest token has a chance there anyway."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. `temperature == 0` is greedy; `top_k == 0` and `top_p == 1` are off."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are left out; 0 is off."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    """End the answer, with `ignore_eos` too."""
    min_tokens: int = 0  # until there are so many, none of `ending_token_ids` is chosen
    ending_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    """Each token comes with its logprob and those of so many of the likeliest; None: without."""
    has_penalties: bool = field(init=False, repr=False, compare=False)
    is_plain_greedy: bool = field(init=False, repr=False, compare=False)
    """The likeliest token, whatever it is. Both are stored, since every step asks them of every row."""

    def __post_init__(self) -> None:
        has_penalties = (
            self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        )
        needs_rules = self.temperature >= LEAST_TEMPERATURE or has_penalties or self.min_tokens > 0
        object.__setattr__(self, "has_penalties", has_penalties)
        object.__setattr__(self, "is_plain_greedy", not needs_rules)

    def banned_at(self, index: int) -> tuple[int, ...]:
        return self.ending_token_ids if index < self.min_tokens else ()


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt being answered. Identity is `seq_id`; prompts of one request share `group_id`."""

    seq_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 1
    group_id: int = 0
    group_size: int = 1
    arrival_s: float = 0.0
    exclusive: bool = False
    """It shares no step with other sequences."""
    client: str = ""
    """Who asked, for orders that are fair to clients."""
    expected_tokens: int | None = None
    """Output tokens that the client expects, if it said so."""
    predicted_tokens: float = 1.0
    """Output tokens that the scheduler expects."""
    block_ids: list[int] = field(default_factory=list)
    """Where its keys and values lie, `KV_BLOCK` positions in each; empty: in memory that the backend finds. A
    block may be shared by sequences whose tokens up to its end are the same."""
    output_token_ids: list[int] = field(default_factory=list)
    prefix_keys: list[bytes] = field(default_factory=list)
    """What stands for the tokens up to the end of each block that may be shared."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were there when it first joined."""
    num_prefill_tokens: int = field(init=False)
    """Tokens, from position 0 on, that are computed as a prompt: the prompt, and, after a preemption, the
    output until then."""
    num_computed_tokens: int = 0
    """Tokens, from position 0 on, whose keys and values are cached, by a launched step at the latest."""
    num_pending_tokens: int = 0
    """Tokens that a launched step will give it, not in `output_token_ids` yet."""
    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None

    # The account of its time, kept by the scheduler and the engine; backends ignore it.
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    batch_wait_s: float = 0.0
    num_steps: int = 0
    sum_batch_rows: int = 0

    def __post_init__(self) -> None:
        self.num_prefill_tokens = len(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far, with those that a launched step will give."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def max_total_tokens(self) -> int:
        """KV positions to reserve: the prompt and everything it may still produce."""
        return len(self.prompt_token_ids) + self.params.max_tokens

    @property
    def length_bin(self) -> int:
        """Answers that are expected to be of like length, within a factor of two, have the same."""
        return math.floor(math.log2(self.predicted_tokens))

    def token_at(self, position: int) -> int:
        num_prompt = len(self.prompt_token_ids)
        if position < num_prompt:
            return self.prompt_token_ids[position]
        return self.output_token_ids[position - num_prompt]


@dataclass(slots=True)  # not frozen, which takes three times as long: each row of each step makes one
class ScheduledChunk:
    """Work of one sequence in one step: the tokens at positions `start .. start + num_tokens - 1`.

    A prompt chunk has `num_tokens >= 1`, a decode row exactly one token. A dead row (a finished sequence that
    a padded batch still carries) recomputes its last position and gives no output. With backends that
    `computes_padding` it may stand at any later position of its slot instead, where no token is known.
    """

    seq: Sequence
    start: int
    num_tokens: int
    dead: bool = False

    @property
    def token_ids(self) -> list[int]:
        seq, num_prompt = self.seq, len(self.seq.prompt_token_ids)
        end = self.start + self.num_tokens
        if end <= num_prompt:
            return seq.prompt_token_ids[self.start : end]
        if self.start >= num_prompt:
            return seq.output_token_ids[self.start - num_prompt : end - num_prompt]
        return seq.prompt_token_ids[self.start :] + seq.output_token_ids[: end - num_prompt]

    @property
    def is_decode(self) -> bool:
        """True for a row whose input is a token that the model produced, and that is computed first now."""
        return self.start >= self.seq.num_prefill_tokens

    @property
    def follows_pending(self) -> bool:
        """True for a decode row whose input a launched step has still to give: only the backend knows it."""
        seq = self.seq
        return self.start >= len(seq.prompt_token_ids) + len(seq.output_token_ids)

    @property
    def samples(self) -> bool:
        """True when the chunk reaches the last known token, so that the step yields a new one."""
        return not self.dead and self.start + self.num_tokens == self.seq.num_tokens


TokenLogprobs = tuple[float, list[tuple[int, float]]]
"""The logprob of a chosen token, then the likeliest ids and theirs, by the model's own scores."""


@dataclass(slots=True)  # not frozen, as `ScheduledChunk`
class StepOutput:
    """New tokens of one sequence, in order; a chunk that ends inside a prompt gives no StepOutput."""

    seq_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One for each token, where the sequence asks for `num_logprobs`."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What is loaded, for `/model`, the parquet manifest and the scheduler's limits."""

    backend: str
    model: str
    device: str
    dtype: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_batch_size: int
    max_model_len: int
    kv_capacity_tokens: int
    num_parameters: int = 0
    model_digest: str = ""
    num_threads: int = 1
    details: dict[str, str | int | float | bool] = field(default_factory=dict)
    has_kv_blocks: bool = False
    """Whether it keeps keys and values in the blocks that `Sequence.block_ids` names. Not for an
    `OverlappingBackend`: others may share a block as soon as the step that fills it is launched."""
    computes_padding: bool = False
    """Whether dead rows may stand at positions without a token, several of one sequence in a step."""
    has_logprobs: bool = False
    """Whether it fills `StepOutput.logprobs`; the service refuses requests for them otherwise."""


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """What every backend is told; `None` and "auto" leave the choice to it. Settings have these defaults."""

    backend: str = "torch"
    model: str = "lab-26m"
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int | None = None
    """Engine threads; None takes physical cores - 1, at least one."""
    max_batch_size: int = 16
    max_step_tokens: int = 512
    prefill_chunk: int = 16
    """Prompts are cut at multiples of this; a backend may rely on it for what it computes together."""
    max_model_len: int | None = None
    artifacts_dir: str = "artifacts"
    model_wait_s: float | None = None
    """How long to wait for a local model that is not there yet; None: only while somebody stages it."""
    kv_memory_fraction: float = 0.8
    """Share of free memory that keys and values may take, for backends that measure it."""
    options: object = None
    """What the backend's description calls its options; None: their defaults."""

    def options_as(self, kind: type[OptionsT]) -> OptionsT:
        if self.options is None:
            return kind()
        assert isinstance(self.options, kind), "options belong to the backend that they are given to"
        return self.options


@runtime_checkable
class Backend(Protocol):
    """One loaded model that computes mixed batches. Called from one thread only."""

    @property
    def info(self) -> BackendInfo: ...

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        """Run one forward pass over prompt chunks and decode rows together.

        Reads `seq.prompt_token_ids`, `seq.output_token_ids` and `seq.params`; changes no sequence.
        A sequence gets cache space with its first chunk and keeps it until `release`. What a sequence gets
        does not depend on which others are in `chunks`. A first chunk that starts above 0 follows keys and
        values that are in its blocks already.

        Raises:
            BackendError: the step failed; no sequence of it got a token. Its chunks may be given again.
        """
        ...

    def release(self, seq_ids: Seq[int]) -> None:
        """Free the cache space of these sequences; an unknown id is ignored."""
        ...

    def close(self) -> None:
        """Free the model. The backend is unusable afterwards."""
        ...


EngineFigure = Literal[
    "preemptions", "kv_usage_ratio", "kv_usage_peak_ratio", "requests", "scheduled_requests"
]
"""What an engine may say of itself; `lab_engine_*` of `/metrics` explains each."""


@runtime_checkable
class BackendWithFigures(Backend, Protocol):
    """A backend whose engine keeps figures of its own."""

    def figures(self) -> Mapping[EngineFigure, float]:
        """As of the last step; read after each, so it has to be cheap."""
        ...


class PendingStep(Protocol):
    """A step that was launched and may still be computing."""

    def result(self) -> list[StepOutput]:
        """Wait for the step; called once, in the order of launching.

        Raises:
            BackendError: the step failed; no sequence of it got a token.
        """
        ...


@runtime_checkable
class OverlappingBackend(Backend, Protocol):
    """A backend that computes while its caller plans: a second step may be launched before the first ended.

    Then a decode row of the second may follow a token that only the first one's result will tell (it
    `follows_pending`). `release` may be called for sequences of a launched step.
    """

    def launch(self, chunks: Seq[ScheduledChunk]) -> PendingStep:
        """Start a step and return at once; `step(chunks)` is `launch(chunks).result()`.

        Each chunk that samples gives exactly one token. One whose output is not needed any more (its sequence
        ended meanwhile) gives it all the same.

        Raises:
            BackendError: it could not be started; no sequence of it gets a token.
        """
        ...


@dataclass(slots=True)
class OwnStep:
    """What one step of an engine that schedules itself has computed, and what it holds now."""

    chunks: list[ScheduledChunk]
    """Empty where the call gave no finished step."""
    outputs: list[StepOutput]
    ended_seq_ids: list[int]
    """Those that the engine ended with this step, at a token that ends them or at `max_tokens`."""
    preempted_seq_ids: list[int]
    """They wait, and compute their prompt and their output again."""
    num_running: int
    queue_depth: int
    kv_used_tokens: int


class SchedulingEngine(Protocol):
    """One loaded model whose own scheduler decides what each step carries. Called from one thread only.

    What a sequence gets does not depend on which others run. The engine ends a sequence as the lab's
    scheduler would: after `max_tokens`, or at a token of `stop_token_ids` or, unless `ignore_eos`, of the
    model's own ends.
    """

    @property
    def info(self) -> BackendInfo: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, seq: Sequence) -> None:
        """Queue it; reads the sequence and changes nothing of it, now and later.

        Raises:
            BackendError: the engine refuses it.
        """
        ...

    def step(self) -> OwnStep:
        """Compute one step; called while it `has_work`.

        Raises:
            BackendError: the engine failed, and cannot go on.
        """
        ...

    def release(self, seq_ids: Seq[int]) -> None:
        """Forget these sequences, waiting or running; an unknown id is ignored."""
        ...

    def close(self) -> None:
        """Free the model. The engine is unusable afterwards."""
        ...
