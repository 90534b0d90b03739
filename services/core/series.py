"""Counters, gauges and histograms without a lock, since one thread alone, the event loop's, writes them.

A token of each row of each step is booked here. `prometheus_client`'s own series take a lock for each
observation and search their buckets one by one, which costs five times as much.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

_MAX_ID_CHARS = 128 - len("request_id")
"""OpenMetrics allows an exemplar 128 characters, the names of its labels included."""


class Number:
    """A counter or a gauge."""

    __slots__ = ("_help_text", "_kind", "_name", "_suffix", "value")

    def __init__(self, kind: str, name: str, help_text: str) -> None:
        self._kind, self._name, self._help_text = kind, name, help_text
        self._suffix = "_total" if kind == "counter" else ""
        self.value = 0.0

    def family(self, labels: Mapping[str, str]) -> Metric:
        family = Metric(self._name, self._help_text, self._kind)
        family.add_sample(self._name + self._suffix, dict(labels), self.value)
        return family


class NumberByLabel:
    """A counter or a gauge with one more label, whose values are all there from the start."""

    __slots__ = ("_help_text", "_kind", "_label", "_name", "_suffix", "values")

    def __init__(self, kind: str, name: str, help_text: str, label: str, values: Iterable[str]) -> None:
        self._kind, self._name, self._help_text, self._label = kind, name, help_text, label
        self._suffix = "_total" if kind == "counter" else ""
        self.values = dict.fromkeys(values, 0.0)

    def family(self, labels: Mapping[str, str]) -> Metric:
        family = Metric(self._name, self._help_text, self._kind)
        for label_value, value in self.values.items():
            family.add_sample(self._name + self._suffix, {**labels, self._label: label_value}, value)
        return family


class Histogram:
    """Counts values in buckets. The last request of each bucket can be kept, as its exemplar."""

    __slots__ = ("_bounds", "_counts", "_exemplars", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: dict[int, Exemplar] = {}
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> int:
        """Returns the index of its bucket."""
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += times
        self._sum += value * times
        return bucket

    def observe_of(self, request_id: str, value: float) -> None:
        """The same, with an exemplar, for what is seen once a request."""
        labels = {"request_id": request_id[:_MAX_ID_CHARS]}
        self._exemplars[self.observe(value)] = Exemplar(labels, value)

    def add_to(self, family: Metric, name: str, labels: Mapping[str, str]) -> None:
        bounds = (*map(floatToGoString, self._bounds), "+Inf")
        for index, (bound, count) in enumerate(zip(bounds, accumulate(self._counts), strict=True)):
            exemplar = self._exemplars.get(index)
            family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count, exemplar=exemplar)
        family.add_sample(f"{name}_count", dict(labels), sum(self._counts))
        family.add_sample(f"{name}_sum", dict(labels), self._sum)


class HistogramFamily:
    """Histograms of one name: one, or one for each value of `label`."""

    __slots__ = ("_help_text", "_label", "_name", "of")

    def __init__(
        self, name: str, help_text: str, bounds: tuple[float, ...], label: str | None, values: Iterable[str]
    ) -> None:
        self._name, self._help_text, self._label = name, help_text, label
        self.of = {value: Histogram(bounds) for value in values}

    def family(self, labels: Mapping[str, str]) -> Metric:
        family = Metric(self._name, self._help_text, "histogram")
        for value, histogram in self.of.items():
            histogram.add_to(family, self._name, {**labels, self._label: value} if self._label else labels)
        return family


class Series:
    """All series of one service, in the order in which they were made."""

    def __init__(self) -> None:
        self._families: list[Number | NumberByLabel | HistogramFamily] = []

    def counter(self, name: str, help_text: str) -> Number:
        self._families.append(number := Number("counter", name, help_text))
        return number

    def gauge(self, name: str, help_text: str) -> Number:
        self._families.append(number := Number("gauge", name, help_text))
        return number

    def counter_by(self, name: str, help_text: str, label: str, values: Iterable[str]) -> NumberByLabel:
        self._families.append(numbers := NumberByLabel("counter", name, help_text, label, values))
        return numbers

    def gauge_by(self, name: str, help_text: str, label: str, values: Iterable[str]) -> NumberByLabel:
        self._families.append(numbers := NumberByLabel("gauge", name, help_text, label, values))
        return numbers

    def histogram(self, name: str, help_text: str, bounds: tuple[float, ...]) -> Histogram:
        self._families.append(family := HistogramFamily(name, help_text, bounds, None, ("",)))
        return family.of[""]

    def histogram_by(
        self, name: str, help_text: str, bounds: tuple[float, ...], label: str, values: Iterable[str]
    ) -> Mapping[str, Histogram]:
        self._families.append(family := HistogramFamily(name, help_text, bounds, label, values))
        return family.of

    def collect(self, labels: Mapping[str, str]) -> Iterator[Metric]:
        for family in self._families:
            yield family.family(labels)
