"""What someone at the terminal sees while a run goes on; never part of a result.

What enters are announcements and finished rows; what leaves are a live line on a terminal, plain lines
elsewhere, both on stderr. Drawing happens between events, at most twice a second: a thread that redraws
would hold up the stamps.
"""

from __future__ import annotations

import sys
from time import perf_counter
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REDRAW_S = 0.5
PLAIN_S = 5.0


class Reporter(Protocol):
    """Where a run reports to."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def announce(self, text: str) -> None: ...

    def begin(self, label: str, total: int) -> None: ...

    def advance(self, num_tokens: int) -> None: ...


def make_reporter() -> Reporter:
    return LiveReporter() if sys.stderr.isatty() else PlainReporter()


class _Rate:
    """Requests and tokens so far, and when they were last shown."""

    def __init__(self) -> None:
        self.label = ""
        self.total = 0
        self.num_done = 0
        self.num_tokens = 0
        self.started_s = perf_counter()
        self.shown_s = 0.0

    def begin(self, label: str, total: int) -> None:
        self.label, self.total, self.num_done, self.num_tokens = label, total, 0, 0
        self.started_s = self.shown_s = perf_counter()

    def advance(self, num_tokens: int, least_gap_s: float) -> bool:
        """Count one finished request; True when it is time to show it."""
        self.num_done += 1
        self.num_tokens += num_tokens
        now_s = perf_counter()
        if now_s - self.shown_s < least_gap_s and self.num_done < self.total:
            return False
        self.shown_s = now_s
        return True

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / max(perf_counter() - self.started_s, 1e-9)


class LiveReporter:
    """One line that is drawn over."""

    def __init__(self) -> None:
        self._rate = _Rate()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, rate="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def announce(self, text: str) -> None:
        self._progress.reset(self._task, description=text, total=None, rate="")
        self._progress.refresh()

    def begin(self, label: str, total: int) -> None:
        self._rate.begin(label, total)
        self._progress.reset(self._task, description=label, total=total, rate="")
        self._progress.refresh()

    def advance(self, num_tokens: int) -> None:
        if self._rate.advance(num_tokens, REDRAW_S):
            rate = f"{self._rate.tokens_per_s:,.0f} tok/s"
            self._progress.update(self._task, completed=self._rate.num_done, rate=rate)
            self._progress.refresh()


class PlainReporter:
    """Lines for logs: every few seconds, and each announcement once."""

    def __init__(self) -> None:
        self._rate = _Rate()
        self._announced_s = 0.0
        self._announced = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def announce(self, text: str) -> None:
        # The seconds in "starting the service, 3 s" do not make it another announcement.
        stem = text.partition(",")[0]
        if stem != self._announced or perf_counter() - self._announced_s > PLAIN_S:
            self._announced, self._announced_s = stem, perf_counter()
            print(text, file=sys.stderr, flush=True)

    def begin(self, label: str, total: int) -> None:
        self._rate.begin(label, total)
        print(f"{label}: {total} requests", file=sys.stderr, flush=True)

    def advance(self, num_tokens: int) -> None:
        if self._rate.advance(num_tokens, PLAIN_S):
            rate = self._rate
            text = f"{rate.label}: {rate.num_done}/{rate.total} answered, {rate.tokens_per_s:,.0f} tok/s"
            print(text, file=sys.stderr, flush=True)
