"""Limits on percentiles of a run, as `ttft_p95_ms=500`; a `Slo` of `metrics` is on single requests.

What enters are texts and rows; what leaves is whether a run met all limits. A percentile with too few samples
behind it meets none. TTFT and total are from schedule, as users feel them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from adapters.base import ConfigError
from harness.results.metrics import token_gaps
from harness.results.stats import MIN_SAMPLES, percentile

_COLUMNS = {"ttft": "ttft_sched_ms", "tpot": "tpot_ms", "total": "total_sched_ms", "itl": None}
_SPELLED = re.compile(r"(ttft|tpot|total|itl)_p(50|95|99)_ms")


@dataclass(frozen=True, slots=True)
class Limits:
    """(latency, percentile, limit in ms)."""

    items: tuple[tuple[str, int, float], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.items)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Limits:
        """Read `ttft_p95_ms=500,tpot_p95_ms=50`.

        Raises:
            ConfigError: a limit is spelled otherwise.
        """
        items: list[tuple[str, int, float]] = []
        for text in ",".join(texts).split(",") if texts else ():
            name, _, value = text.strip().partition("=")
            spelled = _SPELLED.fullmatch(name)
            try:
                limit = float(value)
            except ValueError:
                limit = -1.0
            if spelled is None or not limit > 0:
                raise ConfigError(
                    f"--slo {text!r}: write ttft_p95_ms=500 (ttft, tpot, itl, total; p50, p95, p99)"
                )
            items.append((spelled[1], int(spelled[2]), limit))
        return cls(tuple(items))

    def are_met(self, rows: pd.DataFrame) -> bool:
        """Failed requests meet nothing.

        Raises:
            ConfigError: the run is too short for one of the percentiles.
        """
        if rows["error"].notna().any():
            return False
        for name, q, limit in self.items:
            column = _COLUMNS[name]
            gaps = token_gaps(rows) if column is None else None
            values = rows[column].to_numpy(dtype=float) if gaps is None else gaps.gap_ms
            found = percentile(values, q, weights=None if gaps is None else gaps.weights)
            if found.value is None:
                raise ConfigError(f"{name}_p{q}_ms needs {MIN_SAMPLES[q]} answers a run: set REQUESTS higher")
            if found.value > limit:
                return False
        return True

    def text(self) -> str:
        return ", ".join(f"{name}_p{q}_ms={limit:g}" for name, q, limit in self.items)
