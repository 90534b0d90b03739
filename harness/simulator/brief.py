"""Simulations of millions of requests: a schedule that is made as it is played, and figures without rows.

No request is kept. Of each answer a few numbers stay, in an array of 32-bit floats.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import sha256
from operator import attrgetter
from struct import Struct
from typing import overload

import numpy as np
import pandas as pd

from adapters.base import ConfigError
from harness.plan.arrival_times import arrival_times, think_times
from harness.plan.corpus import Corpus, Prompt
from harness.plan.planner import plan
from harness.plan.schedule import PlannedRequest, Schedule
from harness.results.formulas import Floats, Throughput, request_metrics
from harness.results.slo import Slo
from harness.settings import HarnessSettings
from harness.simulator.fleet_spec import Flight

_FEW = 1000
_KNOWN = {"ttft", "ttft_send", "tpot", "total", "total_send"}
"""Metrics of one value a request."""


def refuse_limits(slo: Slo) -> None:
    """
    Raises:
        ConfigError: a limit is on what brief rows do not know.
    """
    for limit in slo.limits:
        if limit.figure.metric.name not in _KNOWN:
            raise ConfigError(f"{limit.figure.key} needs every token's stamp, which brief rows do not keep")


class _Requests(Sequence[PlannedRequest]):
    """Those of `make_schedule` but for the seeds of sampling, each made when it is asked for."""

    def __init__(self, prompts: Sequence[Prompt], num: int, offsets_s: array[float], think_s: array[float]):
        self._prompts, self._num = prompts, num
        self._offsets_s, self._think_s = offsets_s, think_s
        self._last: PlannedRequest | None = None

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> PlannedRequest: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PlannedRequest]: ...
    def __getitem__(self, index: int | slice) -> PlannedRequest | Sequence[PlannedRequest]:
        if self._last is not None and self._last.index == index:
            return self._last
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._num))]
        if index >= self._num:
            raise IndexError(index)
        prompt = self._prompts[index % len(self._prompts)]
        self._last = PlannedRequest(
            index, prompt.id, prompt.prompt, prompt.max_tokens, 0,
            self._offsets_s[index] if self._offsets_s else None,
            self._think_s[index] if self._think_s else 0.0,
            user=prompt.user, priority=prompt.priority,
        )  # fmt: skip
        return self._last


def long_plan(settings: HarnessSettings, *, allow_changed_corpus: bool) -> tuple[Corpus, Schedule]:
    """As `plan`, in little memory. A trace is read whole all the same.

    Raises:
        ConfigError: as `plan`.
    """
    if settings.trace is not None:
        return plan(settings, allow_changed_corpus=allow_changed_corpus)
    num = settings.requests
    few = settings.model_copy(update={"requests": min(num, _FEW)})
    corpus, schedule = plan(few, allow_changed_corpus=allow_changed_corpus)
    load, seeds = schedule.load, schedule.seeds
    offsets_s = array("d", arrival_times(num, load, seeds["arrivals"]) if load.is_open else ())
    think_s = array("d", think_times(num, load, seeds["think"]) if load.think_ms is not None else ())
    digest = sha256(f"{schedule.digest}/{num}/{corpus.sha256}/{settings.seed}".encode()).hexdigest()
    requests = _Requests(corpus.prompts, num, offsets_s, think_s)
    return corpus, Schedule(load, requests, seeds, digest)  # type: ignore[arg-type]


_METRICS = ("ttft_ms", "ttft_sched_ms", "tpot_ms", "total_ms", "total_sched_ms")
_COLUMNS = ("scheduled_s", *_METRICS, "num_output_tokens")
_values_of = attrgetter(*_METRICS)
_NAN = float("nan")
_FAILED = (_NAN,) * (len(_COLUMNS) - 1)
_ROW = Struct(f"={len(_COLUMNS)}f")
_PIECE = 1 << 15
"""Rows that are computed with at once."""


class BriefRows:
    """What stays of `num` answers at most; milliseconds, and seconds on the virtual clock."""

    def __init__(self, num: int) -> None:
        # All of it at once: an array that grows is copied, and for a moment there twice.
        self._values = np.empty((num, len(_COLUMNS)), np.float32)
        self._buffer = self._values.data
        self._num = 0

    def add(self, flight: Flight) -> None:
        at = _ROW.size * self._num
        self._num += 1
        if flight.error is not None or flight.replica < 0:
            _ROW.pack_into(self._buffer, at, flight.scheduled_s, *_FAILED)
            return
        num = len(flight.seq.output_token_ids)
        metrics = request_metrics(
            scheduled_s=flight.scheduled_s,
            sent_s=flight.sent_s,
            chunk_s=flight.chunk_s,
            chunk_tokens=(1,),
            num_output_tokens=num,
        )
        known = [_NAN if value is None else value for value in _values_of(metrics)]
        _ROW.pack_into(self._buffer, at, flight.scheduled_s, *known, num)

    def frame(self) -> pd.DataFrame:
        """The columns of rows that metrics of one value a request read."""
        frame = pd.DataFrame(self._values[: self._num], columns=list(_COLUMNS), copy=False)
        codes = np.where(frame["num_output_tokens"].isna(), np.int8(0), np.int8(-1))
        frame["error"] = pd.Categorical.from_codes(codes, pd.Index(["failed"]))
        return frame

    def throughput(self, *, is_open: bool) -> Throughput | None:
        """As `formulas.throughput`, with the tokens behind the first spread evenly over an answer's time."""
        num_answered, window_s = 0, 0.0  # the clock begins with the schedule
        for scheduled_s, _, done_s, num in self._pieces():
            num_answered += int((num > 0).sum())
            window_s = max(window_s, float(np.fmax.reduce(scheduled_s if is_open else done_s, initial=0.0)))
        if not num_answered or window_s <= 0:
            return None
        num_tokens = num_inside = 0.0
        for _, first_s, done_s, num in self._pieces():
            with np.errstate(divide="ignore", invalid="ignore"):
                share = np.clip((window_s - first_s) / (done_s - first_s), 0.0, 1.0)
            inside = np.where(first_s <= window_s, 1 + (num - 1) * np.nan_to_num(share, nan=1.0), 0.0)
            num_tokens += float(np.nansum(inside))
            num_inside += float((done_s <= window_s).sum())
        return Throughput(num_tokens / window_s, num_inside / window_s, window_s)

    def _pieces(self) -> Iterator[tuple[Floats, Floats, Floats, Floats]]:
        """Of some rows at a time: when they were scheduled, had a first token and were done; tokens."""
        for begin in range(0, self._num, _PIECE):
            piece = self._values[begin : min(begin + _PIECE, self._num)]
            of = dict(zip(_COLUMNS, piece.T.astype(float), strict=True))
            scheduled_s = of["scheduled_s"]
            first_s, done_s = (scheduled_s + of[name] / 1e3 for name in ("ttft_sched_ms", "total_sched_ms"))
            yield scheduled_s, first_s, done_s, of["num_output_tokens"]
