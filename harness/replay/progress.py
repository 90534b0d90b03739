"""What someone at the terminal sees while a run goes on, on stderr; never part of a result.

Drawing happens between events, at most twice a second. A thread that redraws would delay the stamps.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from statistics import median
from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.client.answer import Answer
from harness.plan.schedule import Schedule

REDRAW_S = 0.5
PLAIN_S = 5.0


class _Tally:
    """What has come so far, and when it was last shown."""

    def __init__(self, label: str, schedule: Schedule) -> None:
        self.label, self.total = label, len(schedule.requests)
        self.num_done = 0
        self._num_failed = 0
        self._num_tokens = 0
        self._ttft_ms: list[float] = []
        is_open = schedule.load.is_open
        self._offsets_s = [request.offset_s or 0.0 for request in schedule.requests] if is_open else []
        self._num_users = schedule.num_users
        self._started_s = self._shown_s = perf_counter()

    def advance(self, answer: Answer, least_gap_s: float) -> bool:
        """Count one finished answer; True when it is time to show it."""
        self.num_done += 1
        self._num_failed += answer.error is not None
        self._num_tokens += answer.num_output_tokens or 0
        if answer.chunk_s:
            self._ttft_ms.append((answer.chunk_s[0] - answer.scheduled_s) * 1e3)
        now_s = perf_counter()
        if now_s - self._shown_s < least_gap_s and self.num_done < self.total:
            return False
        self._shown_s = now_s
        return True

    def text(self) -> str:
        """In flight, errors, tokens/s, TTFT so far, time left."""
        elapsed_s = max(perf_counter() - self._started_s, 1e-9)
        parts = [f"{self._num_in_flight(elapsed_s)} in flight", f"{self._num_tokens / elapsed_s:,.0f} tok/s"]
        if self._ttft_ms:
            parts.append(f"TTFT p50 {median(self._ttft_ms):,.0f} ms")
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        if self.num_done < self.total:
            parts.append(f"{self._left_s(elapsed_s):,.0f} s left")
        return ", ".join(parts)

    def _num_in_flight(self, elapsed_s: float) -> int:
        """Of an open loop: what should have left by now and is not back."""
        if self._offsets_s:
            return max(0, bisect_right(self._offsets_s, elapsed_s) - self.num_done)
        return min(self._num_users, self.total - self.num_done)

    def _left_s(self, elapsed_s: float) -> float:
        if self._offsets_s:
            return max(0.0, self._offsets_s[-1] - elapsed_s)
        return elapsed_s / self.num_done * (self.total - self.num_done)


class LiveReporter:
    """One line that is drawn over."""

    def __init__(self) -> None:
        self._tally: _Tally | None = None
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

    def begin(self, label: str, schedule: Schedule) -> None:
        self._tally = _Tally(label, schedule)
        self._progress.reset(self._task, description=label, total=self._tally.total, rate="")
        self._progress.refresh()

    def advance(self, answer: Answer) -> None:
        if self._tally is not None and self._tally.advance(answer, REDRAW_S):
            self._progress.update(self._task, completed=self._tally.num_done, rate=self._tally.text())
            self._progress.refresh()


class PlainReporter:
    """Lines for logs: every few seconds, and each announcement once."""

    def __init__(self) -> None:
        self._tally: _Tally | None = None
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

    def begin(self, label: str, schedule: Schedule) -> None:
        self._tally = _Tally(label, schedule)
        print(f"{label}: {self._tally.total} requests", file=sys.stderr, flush=True)

    def advance(self, answer: Answer) -> None:
        tally = self._tally
        if tally is not None and tally.advance(answer, PLAIN_S):
            text = f"{tally.label}: {tally.num_done}/{tally.total} answered, {tally.text()}"
            print(text, file=sys.stderr, flush=True)


Reporter = LiveReporter | PlainReporter
"""Where a run reports to."""


def make_reporter() -> Reporter:
    return LiveReporter() if sys.stderr.isatty() else PlainReporter()
