"""What `/metrics` of a foreign server says while a replay goes on: batch, queue, KV cache.

The server is asked at most once a second, by a thread, and only a few lines of each answer are looked at, so
that the measurement hardly notices. All work of the server counts, that of other clients too.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Self

import numpy as np

from harness.results.facts import ServerGauges

PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class _Names:
    """Of one server, without its prefix. `queue_s` and `prefill_s` are histograms of one value a request."""

    server: str
    running: str
    waiting: str
    kv_usage: tuple[str, ...]
    queue_s: str | None = None
    prefill_s: str | None = None


# Source: vLLM v1/metrics/loggers.py, SGLang srt/metrics/collector.py, llama.cpp tools/server/server-task.cpp.
_SERVERS = {
    "vllm": _Names(
        "vLLM",
        "num_requests_running",
        "num_requests_waiting",
        ("kv_cache_usage_perc", "gpu_cache_usage_perc"),  # the second one before vLLM 0.9
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
    ),
    "sglang": _Names("SGLang", "num_running_reqs", "num_queue_reqs", ("token_usage",), "queue_time_seconds"),
    "llamacpp": _Names("llama.cpp", "requests_processing", "requests_deferred", ("kv_cache_usage_ratio",)),
}
_LLAMA_TOTALS = ("prompt_seconds_total", "n_decode_total", "n_busy_slots_per_decode")
_WANTED = sorted(
    {name for s in _SERVERS.values() for name in (s.running, s.waiting, *s.kv_usage)}
    | {
        f"{name}_{end}"
        for s in _SERVERS.values()
        for name in (s.queue_s, s.prefill_s)
        for end in ("sum", "count")
    }
    | set(_LLAMA_TOTALS)
)
# Some versions of prometheus-client write colons as underscores.
_LINE = re.compile(rf"^({'|'.join(_SERVERS)})[:_]({'|'.join(_WANTED)})(?:\{{(.*)\}})? (\S+)", re.MULTILINE)
_RANK = re.compile(r'(?:tp|pp|moe_ep)_rank="[^"]*",?')
"""Ranks of one engine tell the same figure each; engines side by side (`engine`, `dp_rank`) add up."""


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    server: str
    """A key of `_SERVERS`."""
    values: dict[str, list[float]]
    """One value an engine."""

    def total(self, name: str) -> float | None:
        return sum(self.values[name]) if name in self.values else None


def parse_metrics(text: str, at_s: float) -> Sample | None:
    """None where the text is that of none of the three servers."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for server, name, labels, value in _LINE.findall(text):
        of_engine = found.setdefault((server, name), {})
        engine = _RANK.sub("", labels)
        of_engine[engine] = max(float(value), of_engine.get(engine, float("-inf")))
    for server, names in _SERVERS.items():
        if (server, names.running) in found:
            own = {name: list(of.values()) for (which, name), of in found.items() if which == server}
            return Sample(at_s, server, own)
    return None


@dataclass(slots=True)
class GaugeWatch:
    """Asks `read` (the text of `/metrics`, or LookupError with what is wrong) while it is entered."""

    read: Callable[[], str]
    _samples: list[Sample] = field(default_factory=list)
    _problem: str | None = None
    _is_over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._take()
        if self._samples:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
            self._take()

    def _watch(self) -> None:
        while not self._is_over.wait(PERIOD_S):
            self._take()

    def _take(self) -> None:
        try:
            sample = parse_metrics(self.read(), perf_counter())
        except LookupError as error:
            self._problem = str(error)
            return
        if sample is None:
            self._problem = "its /metrics is not that of vLLM, SGLang or llama.cpp"
        else:
            self._samples.append(sample)

    def gauges(self, started_s: float, ended_s: float, num_requests: int) -> ServerGauges:
        """What was told of a replay between two instants, in which `num_requests` were answered."""
        during = [sample for sample in self._samples if started_s <= sample.at_s <= ended_s]
        if not during:
            problem = self._problem or "the replay was over before it was asked once"
            return ServerGauges(server=None, num_samples=0, problem=problem)
        names = _SERVERS[during[0].server]
        first, last = self._samples[0], self._samples[-1]
        waiting = [v for s in during if (v := s.total(names.waiting)) is not None]
        kv_name = next((name for name in names.kv_usage if name in during[0].values), "")
        kv_usage = [float(np.mean(s.values[kv_name])) for s in during if kv_name in s.values]
        queue_s = _mean_between(first, last, names.queue_s)
        if queue_s is None and waiting and num_requests:
            queue_s = float(np.mean(waiting)) * (ended_s - started_s) / num_requests  # Little's law
        prefill_s = _mean_between(first, last, names.prefill_s)
        if prefill_s is None and num_requests:
            spent_s = _grown(first, last, "prompt_seconds_total")
            prefill_s = None if spent_s is None else spent_s / num_requests
        return ServerGauges(
            server=names.server,
            num_samples=len(during),
            mean_batch_size=_slots_a_decode(first, last)
            or float(np.mean([s.total(names.running) for s in during if names.running in s.values])),
            mean_waiting=float(np.mean(waiting)) if waiting else None,
            max_waiting=max(waiting, default=None),
            mean_kv_usage=float(np.mean(kv_usage)) if kv_usage else None,
            max_kv_usage=max(kv_usage, default=None),
            queue_s=queue_s,
            prefill_s=prefill_s,
        )


def _grown(first: Sample, last: Sample, name: str) -> float | None:
    """None where it is not told, or the server began anew."""
    before, after = first.total(name), last.total(name)
    return None if before is None or after is None or after < before else after - before


def _mean_between(first: Sample, last: Sample, histogram: str | None) -> float | None:
    total, count = (_grown(first, last, f"{histogram}_{end}") for end in ("sum", "count"))
    return total / count if total is not None and count else None


def _slots_a_decode(first: Sample, last: Sample) -> float | None:
    """llama.cpp's own mean batch. It tells the mean since its start, so the replay's is a difference."""
    num_decodes = _grown(first, last, "n_decode_total")
    if not num_decodes or "n_busy_slots_per_decode" not in last.values:
        return None
    busy = [s.values["n_busy_slots_per_decode"][0] * s.values["n_decode_total"][0] for s in (first, last)]
    return (busy[1] - busy[0]) / num_decodes
