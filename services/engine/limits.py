"""What the scheduler may not exceed, and whether a request can ever fit within it.

The API asks `check` before it accepts a request, so that the answer is a 400; the scheduler asks again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from adapters.base import BackendConfig, ConfigError, RequestTooLong, Sequence

_DEFAULT = BackendConfig()


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Raises ConfigError for numbers that cannot work together."""

    kv_capacity_tokens: int
    max_model_len: int
    max_batch: int = _DEFAULT.max_batch_size
    max_step_tokens: int = _DEFAULT.max_step_tokens
    """Prompt tokens, decode rows and dead rows of one step, together."""
    prefill_chunk: int = _DEFAULT.prefill_chunk
    """Prompts are cut at multiples of this many positions."""
    long_prefill_token_threshold: int = 0
    """While others decode, prompts of more tokens get one chunk a step for each of them; 0: never so."""
    pad_finished: bool = True
    """Strategies that keep finished rows do so; False drops them."""
    pads_like_generate: bool = False
    """Padded batches compute the padding of their prompts, and their finished rows go on growing."""
    aging_s: float = 10.0
    """A waiting request gains one priority level each time this long passes; 0 ignores priorities."""

    def __post_init__(self) -> None:
        for name in ("kv_capacity_tokens", "max_model_len", "max_batch", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.long_prefill_token_threshold < 0:
            raise ConfigError(
                f"LONG_PREFILL_TOKEN_THRESHOLD is {self.long_prefill_token_threshold}: it must be 0 or more"
            )
        if not (math.isfinite(self.aging_s) and self.aging_s >= 0):
            raise ConfigError(f"AGING_S is {self.aging_s}: it must be a number of seconds, 0 or more")
        if self.max_step_tokens < self.max_batch + self.prefill_chunk:
            raise ConfigError(
                f"MAX_STEP_TOKENS is {self.max_step_tokens}, but a full batch and one prompt chunk need "
                f"MAX_BATCH + PREFILL_CHUNK = {self.max_batch} + {self.prefill_chunk} = "
                f"{self.max_batch + self.prefill_chunk}: raise MAX_STEP_TOKENS or lower one of the others"
            )

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt and budget of one sequence together."""
        return min(self.max_model_len, self.kv_capacity_tokens)

    def check(self, sequences: Seq[Sequence], *, together: bool = False) -> None:
        """Return if every sequence can run some day; `together` is the strategy's `takes_groups`.

        Raises:
            RequestTooLong: one sequence, or a slice of a group that has to run together, never fits.
        """
        max_tokens = self.max_sequence_tokens
        for seq in sequences:
            if seq.max_total_tokens > max_tokens:
                raise RequestTooLong(
                    f"the prompt has {seq.num_prompt_tokens} tokens and max_tokens is "
                    f"{seq.params.max_tokens}, {seq.max_total_tokens} together; at most {max_tokens} fit: "
                    f"shorten the prompt or lower max_tokens"
                )
        if together:
            for begin in range(0, len(sequences), self.max_batch):
                self._check_slice(sequences[begin : begin + self.max_batch])

    def _check_slice(self, sequences: Seq[Sequence]) -> None:
        num_tokens = sum(seq.max_total_tokens for seq in sequences)
        if num_tokens > self.kv_capacity_tokens:
            raise RequestTooLong(
                f"{len(sequences)} prompts of this request run as one batch and need {num_tokens} KV tokens; "
                f"there are {self.kv_capacity_tokens}: send fewer prompts in a request or lower max_tokens"
            )


DEFAULTS = SchedulerLimits(kv_capacity_tokens=1, max_model_len=1)
"""The defaults of the fields that have one. The first two fields have none: their values here are unused."""
