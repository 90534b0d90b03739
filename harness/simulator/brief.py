"""Simulations of millions of requests: a schedule that is made as it is played, and figures without rows.

No request is kept. Of each answer a few numbers stay, in arrays of 32-bit floats.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from operator import attrgetter
from typing import overload

import numpy as np
import pandas as pd

from adapters.base import ConfigError
from harness.plan.arrival_times import arrival_times, think_times
from harness.plan.corpus import Corpus, Prompt
from harness.plan.planner import plan
from harness.plan.schedule import PlannedRequest, Schedule
from harness.results.formulas import Throughput, request_metrics
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
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._num))]
        if index >= self._num:
            raise IndexError(index)
        if self._last is None or self._last.index != index:
            prompt = self._prompts[index % len(self._prompts)]
            self._last = PlannedRequest(
                index, prompt.id, prompt.prompt, prompt.max_tokens, 0,
                self._offsets_s[index] if self._offsets_s else None,
                self._think_s[index] if self._think_s else 0.0,
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
_values_of = attrgetter(*_METRICS)
_NAN = float("nan")
_FAILED = (_NAN,) * (len(_METRICS) + 1)


@dataclass(slots=True)
class BriefRows:
    """What stays of the answers; milliseconds, and seconds on the virtual clock."""

    columns: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("f") for name in (*_METRICS, "num_output_tokens")}
    )
    scheduled_s: array[float] = field(default_factory=lambda: array("d"))

    def add(self, flight: Flight) -> None:
        self.scheduled_s.append(flight.scheduled_s)
        values = _FAILED
        if flight.error is None and flight.replica >= 0:
            num = len(flight.seq.output_token_ids)
            metrics = request_metrics(
                scheduled_s=flight.scheduled_s,
                sent_s=flight.sent_s,
                chunk_s=flight.chunk_s,
                chunk_tokens=(1,),
                num_output_tokens=num,
            )
            values = (*_values_of(metrics), num)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(_NAN if value is None else value)

    def frame(self) -> pd.DataFrame:
        """The columns of rows that metrics of one value a request read."""
        columns = {name: np.frombuffer(values, dtype=np.float32) for name, values in self.columns.items()}
        frame = pd.DataFrame(columns, copy=False)
        frame["error"] = pd.Series(None, frame.index, dtype=object).mask(
            frame["num_output_tokens"].isna(), "failed"
        )
        return frame

    def throughput(self, *, is_open: bool) -> Throughput | None:
        """As `formulas.throughput`, with the tokens behind the first spread evenly over an answer's time."""
        scheduled_s = np.frombuffer(self.scheduled_s)
        of = {name: np.frombuffer(values, dtype=np.float32) for name, values in self.columns.items()}
        num, total_s = of["num_output_tokens"], of["total_sched_ms"] / 1e3
        done_s = scheduled_s + total_s
        if not (num > 0).any():
            return None
        end_s = scheduled_s.max() if is_open else np.nanmax(done_s)
        window_s = float(end_s)  # the clock begins with the schedule
        if window_s <= 0:
            return None
        first_s = scheduled_s + of["ttft_sched_ms"] / 1e3
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.clip((end_s - first_s) / (done_s - first_s), 0.0, 1.0)
        inside = np.where(first_s <= end_s, 1 + (num - 1) * np.nan_to_num(share, nan=1.0), 0.0)
        return Throughput(
            float(np.nansum(inside)) / window_s, float((done_s <= end_s).sum()) / window_s, window_s
        )
