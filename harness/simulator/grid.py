"""A designed grid of steps on a backend, without scheduler and HTTP: what a serving run rarely meets.

Each point is a number of rows at one context. Its prompts are computed in pieces of several sizes, its rows
decode alone and beside prompts. After each point the engine is idle for a while, as in a service under low
load, and then answers two short prompts. The points come in a drawn order, so that what is held out of a fit
is like the rest of it, and a machine that drifts does not look like a cost of long contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from random import Random
from time import perf_counter, sleep

import pandas as pd

from adapters.base import Backend, BackendConfig, ConfigError, SamplingParams, ScheduledChunk, Sequence
from services.engine.step_plan import contexts

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_CONTEXTS = (16, 64, 256, 1024, 4096)
_NUM_DECODES = 24
_NUM_MIXED = 4
_PAUSE_S, _AFTER_PAUSE, _SHORT_PROMPT = 0.1, 12, 128
_MOST_TOKENS = 8192
"""Of the prompts of a point together: one of more takes long and tells little that is new."""


def measure_grid(
    backend: Backend,
    config: BackendConfig,
    *,
    seed: int = 0,
    clock: Callable[[], float] = perf_counter,
    pause: Callable[[float], None] = sleep,
) -> pd.DataFrame:
    """The steps, with the columns of a step log that `fit_cost` reads.

    Raises:
        BackendError: a step failed.
        ConfigError: sequences can only be so short that no point is possible.
    """
    grid = _Grid(backend, config, Random(seed), clock, pause)
    points = grid.points()
    if not points:
        raise ConfigError(f"{backend.info.max_model_len} tokens of a sequence are too few for a grid")
    grid.measure(*max(points))  # the first steps of a process are slow, and so is the first use of a slot
    grid.steps.clear()
    for num_rows, context in points:
        grid.measure(num_rows, context)
        grid.measure_after_pause()
    return pd.DataFrame(grid.steps)


class _Grid:
    def __init__(
        self,
        backend: Backend,
        config: BackendConfig,
        draw: Random,
        clock: Callable[[], float],
        pause: Callable[[float], None],
    ) -> None:
        self.steps: list[dict[str, float]] = []
        self._backend, self._config, self._draw = backend, config, draw
        self._clock, self._pause = clock, pause
        self._seq_ids = count()

    def points(self) -> list[tuple[int, int]]:
        info, most_rows = self._backend.info, self._config.max_batch_size
        most_tokens = min(_MOST_TOKENS, info.kv_capacity_tokens // 2)
        points = [
            (num_rows, context)
            for num_rows in sorted({rows for rows in _ROWS if rows < most_rows} | {most_rows})
            for context in _CONTEXTS
            if num_rows * context <= most_tokens
            and 2 * context + _NUM_DECODES + _NUM_MIXED < info.max_model_len
        ]
        self._draw.shuffle(points)
        return points

    def measure(self, num_rows: int, context: int) -> None:
        rows = [self._sequence(context) for _ in range(num_rows)]
        self._compute_prompts(rows)
        for _ in range(_NUM_DECODES):
            self._step(_decoding(rows))
        for _ in range(_NUM_MIXED if num_rows < self._config.max_batch_size else 0):
            size = self._draw.choice(self._sizes(self._config.max_step_tokens - num_rows))
            joining = self._sequence(min(size, self._backend.info.max_model_len - 1))
            self._step([*_decoding(rows), ScheduledChunk(joining, 0, joining.num_prompt_tokens)])
            self._backend.release([joining.seq_id])
        self._backend.release([seq.seq_id for seq in rows])

    def measure_after_pause(self) -> None:
        """A short prompt after a pause, and another one right behind it."""
        most = min(_SHORT_PROMPT, self._config.max_step_tokens, self._backend.info.max_model_len // 2)
        self._pause(_PAUSE_S)
        for _ in range(2):
            alone = self._sequence(self._draw.randint(1, most))
            self._step([ScheduledChunk(alone, 0, alone.num_prompt_tokens)])
            for _ in range(_AFTER_PAUSE):
                self._step(_decoding([alone]))
            self._backend.release([alone.seq_id])

    def _compute_prompts(self, rows: list[Sequence]) -> None:
        """Several of them in a step, whole or in pieces."""
        while left := [seq for seq in rows if seq.num_computed_tokens < seq.num_prompt_tokens]:
            room, chunks = self._config.max_step_tokens, list[ScheduledChunk]()
            for seq in left[: self._draw.randint(1, 4)]:
                num_left = seq.num_prompt_tokens - seq.num_computed_tokens
                if room < self._config.prefill_chunk:
                    break
                num_tokens = min(num_left, self._draw.choice(self._sizes(room)))
                chunks.append(ScheduledChunk(seq, seq.num_computed_tokens, num_tokens))
                room -= num_tokens
            self._step(chunks)

    def _sizes(self, room: int) -> list[int]:
        """Of a piece of a prompt: multiples of the chunk, each twice the one before."""
        sizes, size = list[int](), self._config.prefill_chunk
        while size <= min(room, self._backend.info.max_model_len - 1) or not sizes:
            sizes.append(size)
            size *= 2
        return sizes

    def _sequence(self, num_tokens: int) -> Sequence:
        vocab_size = self._backend.info.vocab_size
        prompt = [self._draw.randrange(vocab_size) for _ in range(num_tokens)]
        return Sequence(next(self._seq_ids), prompt, SamplingParams(max_tokens=1 << 20, ignore_eos=True))

    def _step(self, chunks: list[ScheduledChunk]) -> None:
        num_rows = sum(chunk.is_decode for chunk in chunks)
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        of_contexts = contexts(chunks)
        began_s = self._clock()
        outputs = self._backend.step(chunks)
        took_s = self._clock() - began_s
        self.steps.append(
            {"num_decode_tokens": num_rows, "num_dead_rows": 0, "num_prompt_tokens": num_tokens - num_rows,
             **of_contexts, "start_s": began_s, "duration_s": took_s}
        )  # fmt: skip
        token_ids = {output.seq_id: output.token_ids for output in outputs}
        for chunk in chunks:
            chunk.seq.num_computed_tokens = chunk.start + chunk.num_tokens
            chunk.seq.output_token_ids += token_ids.get(chunk.seq.seq_id, [])


def _decoding(rows: list[Sequence]) -> list[ScheduledChunk]:
    return [ScheduledChunk(seq, seq.num_computed_tokens, 1) for seq in rows]
