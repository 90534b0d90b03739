"""What someone at the terminal sees while a run goes on; never part of a result.

A process of its own draws (`harness.replay.screen`). This one counts, and twice a second writes one line into
a socket that never makes it wait: drawing, or a terminal that stands still, would delay the stamps.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from bisect import bisect_right, insort
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from harness.client.answer import Answer
from harness.client.server import Server
from harness.plan.schedule import Schedule

RESEND_S = 0.5
PLAIN_S = 5.0
_END_S = 3.0


class _Tally:
    """What has come so far, and when it was last shown."""

    def __init__(self, label: str, schedule: Schedule) -> None:
        self.label, self.total = label, len(schedule.requests)
        self.num_done = 0
        self._num_failed = 0
        self._num_tokens = 0
        self._ttft_ms: list[float] = []  # sorted
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
            insort(self._ttft_ms, (answer.chunk_s[0] - answer.scheduled_s) * 1e3)
        now_s = perf_counter()
        if now_s - self._shown_s < least_gap_s and self.num_done < self.total:
            return False
        self._shown_s = now_s
        return True

    def facts(self) -> list[str]:
        """In flight, errors, tokens/s, TTFT so far."""
        elapsed_s = self._elapsed_s()
        parts = [f"{self._num_in_flight(elapsed_s)} in flight", f"{self._num_tokens / elapsed_s:,.0f} tok/s"]
        if self._ttft_ms:
            parts.append(f"TTFT p50 {self._ttft_ms[(len(self._ttft_ms) - 1) // 2]:,.0f} ms")
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        return parts

    def left_s(self) -> float | None:
        """None before the first answer of a closed loop."""
        elapsed_s = self._elapsed_s()
        if self._offsets_s:
            return max(0.0, self._offsets_s[-1] - elapsed_s)
        return elapsed_s / self.num_done * (self.total - self.num_done) if self.num_done else None

    def _elapsed_s(self) -> float:
        return max(perf_counter() - self._started_s, 1e-9)

    def _num_in_flight(self, elapsed_s: float) -> int:
        """Of an open loop: what should have left by now and is not back."""
        if self._offsets_s:
            return max(0, bisect_right(self._offsets_s, elapsed_s) - self.num_done)
        return min(self._num_users, self.total - self.num_done)


class PlainReporter:
    """Lines for logs: every few seconds, and each announcement once."""

    least_gap_s = PLAIN_S

    def __init__(self) -> None:
        self._tally: _Tally | None = None
        self._announced_s = 0.0
        self._announced = ""
        self._place = ""
        self._run_started_s = perf_counter()
        self._runs_s: list[float] = []
        self._num_to_come = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start_run(self, place: str, num_to_come: int) -> None:
        """One of several runs begins, of which `num_to_come` follow it; `place` says which it is."""
        now_s = perf_counter()
        if self._place:
            self._runs_s.append(now_s - self._run_started_s)
        self._run_started_s, self._place = now_s, place
        self._num_to_come = num_to_come
        self._tally = None
        self.announce(place)

    def announce(self, text: str) -> None:
        # The seconds in "starting the service, 3 s" do not make it another announcement.
        stem = text.partition(",")[0]
        if stem != self._announced or perf_counter() - self._announced_s > PLAIN_S:
            self._announced, self._announced_s = stem, perf_counter()
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        print(text, file=sys.stderr, flush=True)

    def begin(self, label: str, schedule: Schedule, server: Server | None = None) -> None:
        self._tally = _Tally(label, schedule)
        print(f"{label}: {self._tally.total} requests", file=sys.stderr, flush=True)

    def advance(self, answer: Answer) -> None:
        if self._tally is not None and self._tally.advance(answer, self.least_gap_s):
            self._show(self._tally)

    def _show(self, tally: _Tally) -> None:
        parts = tally.facts()
        if tally.num_done < tally.total and (left_s := tally.left_s()) is not None:
            parts.append(f"{left_s:,.0f} s left")
        if (all_s := self._all_left_s()) is not None:
            parts.append(f"{all_s:,.0f} s over all")
        text = f"{tally.label}: {tally.num_done}/{tally.total} answered, {', '.join(parts)}"
        print(text, file=sys.stderr, flush=True)

    def _all_left_s(self) -> float | None:
        """Of all runs, from the mean of those that are done; None for one run alone, and during the first
        until its own time left is known."""
        if not self._runs_s and not self._num_to_come:
            return None
        spent_s = perf_counter() - self._run_started_s
        if self._runs_s:
            mean_s = sum(self._runs_s) / len(self._runs_s)
        elif self._tally and (left_s := self._tally.left_s()) is not None:
            mean_s = spent_s + left_s
        else:
            return None
        return max(0.0, mean_s - spent_s) + mean_s * self._num_to_come


class LiveReporter(PlainReporter):
    """A picture that is drawn over, by a process that ends with this one and leaves the terminal clean."""

    least_gap_s = RESEND_S

    def __init__(self) -> None:
        super().__init__()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._unsent = b""
        self._server: dict[str, Any] = {}
        with theirs:
            self._screen = subprocess.Popen(
                [sys.executable, "-m", "harness.replay.screen"], stdin=theirs.fileno()
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._screen.wait(_END_S)
        self._screen.kill()

    def announce(self, text: str) -> None:
        self._send({"place": self._place, "notice": text, "all_left_s": self._all_left_s()})

    def say(self, text: str) -> None:
        self._send({"said": text})

    def begin(self, label: str, schedule: Schedule, server: Server | None = None) -> None:
        self._tally = _Tally(label, schedule)
        self._server = {}
        if server is not None and server.card is not None:
            self._server = {"url": server.url, "authorization": server.target.authorization}
            self._server["max_batch"] = server.card.max_batch_size
        self._show(self._tally)

    def _show(self, tally: _Tally) -> None:
        told = {"done": tally.num_done, "total": tally.total, "facts": tally.facts()}
        told |= {"left_s": tally.left_s(), "all_left_s": self._all_left_s()}
        self._send({"place": self._place or tally.label, "server": self._server, **told})

    def _send(self, told: dict[str, Any]) -> None:
        """What does not fit into the socket is left out: the next line says the same, newer."""
        line = json.dumps(told).encode() + b"\n"
        with contextlib.suppress(OSError):
            if self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            if not self._unsent:
                self._unsent = line[self._socket.send(line) :]


Reporter = PlainReporter
"""Where a run reports to."""


def make_reporter() -> Reporter:
    is_screen = sys.stderr.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return LiveReporter() if is_screen else PlainReporter()
