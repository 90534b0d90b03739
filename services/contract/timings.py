"""What the service measures: the timings of an answer and the counters of a step.

These fields are the one definition of both. The JSON of an answer, `/steps`, the step log and the columns
of the harness's parquet files are made from them, in this order, under these names. A new field of
`StepRecord` is an int or a float, and has a default, so that `/steps` of an older service is still read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class SequenceTimings:
    """Where one answer's time went. Durations are in seconds.

    An instant is in seconds on the server's monotonic clock, which a client on the same machine shares.
    Instants take no part in `==`.
    """

    queue_s: float
    """Time in the queue while slot or KV was missing."""
    batch_wait_s: float
    """Time in the queue while slot and KV were free, or kept by finished rows: the strategy held back."""
    prefill_s: float
    """From admission to the first token."""
    decode_s: float
    """From the first token to the last."""
    num_steps: int
    """Steps that computed a row of this sequence."""
    mean_batch_size: float
    """Rows of these steps, dead ones left out."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were in the prefix cache."""
    received_s: float | None = field(default=None, compare=False)
    """When the API received the request."""
    first_token_s: float | None = field(default=None, compare=False)
    """When the step that made the first token was done."""
    first_write_s: float | None = field(default=None, compare=False)
    """When the API took the first token to write it."""


INSTANTS = tuple(entry.name for entry in fields(SequenceTimings) if not entry.compare)
"""The timings that mean nothing without the server's clock."""


@dataclass(frozen=True)
class StepRecord:
    """One engine step.

    A step that was launched while the one before computed starts where that one ended, so durations never
    add up to more than the time that passed.
    """

    step: int
    """Counts from 0 in each engine; `/steps` counts on over restarts."""
    start_s: float
    """Instant on the engine's monotonic clock."""
    duration_s: float
    num_rows: int
    """Rows computed, dead ones left out."""
    num_prompt_tokens: int
    num_decode_tokens: int
    num_dead_rows: int
    """Rows of finished sequences in a padded batch, and rows whose sequence ended after the launch."""
    queue_depth: int
    """Prompts that wait without a slot, when the step is done."""
    num_prompt_chunks: int = 0
    decode_context_tokens: int = 0
    """Positions that decode rows and dead rows attend to, over all of them; a row's own is one of them."""
    prompt_context_tokens: int = 0
    """The same of all prompt tokens: their number times their context."""
    num_preempted: int = 0
    """Sequences whose KV memory was taken for this step; they wait and compute their tokens again."""
    num_looked_up_tokens: int = 0
    """With PREFIX_CACHE=1: prompt tokens of the sequences that joined for this step."""
    num_cached_tokens: int = 0
    """Those of them whose keys and values were in the prefix cache."""
    publish_s: float = 0.0
    """What it took to send the tokens of the step before, which no record of its own step can say."""
