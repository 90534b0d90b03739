"""The program that draws a running bench on the terminal, from the lines that it reads on its standard input.

It asks the service under test for its last steps once a second, about `MAX_STEPS` of them. That costs the
service's API 0.3 ms a second on a 2.8 GHz core. Ctrl-C is for the harness; this ends with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import urllib.request
from collections import deque
from time import monotonic
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

POLL_S = 1.0
MAX_STEPS = 32
_TIMEOUT_S = 0.5
_NUM_HEIGHTS = 60
_HEIGHTS = " ▁▂▃▄▅▆▇█"


class Batch:
    """How full the batch of a service is, second by second."""

    def __init__(self) -> None:
        self._server: dict[str, Any] = {}
        self._asked_s = 0.0
        self._next: int | None = None
        self._steps_per_s = 0.0
        self._live: deque[float] = deque(maxlen=_NUM_HEIGHTS)
        self._dead = 0.0
        self._waiting = 0
        # Proxies of the environment are for the web, not for a server under test.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def follow(self, server: dict[str, Any]) -> None:
        if server != self._server:
            self._server, self._next, self._steps_per_s = server, None, 0.0
            self._live.clear()

    def poll(self) -> None:
        """At most once a second; a service that does not answer at once is asked again later."""
        now_s = monotonic()
        if not self._server or now_s - self._asked_s < POLL_S:
            return
        passed_s, self._asked_s = now_s - self._asked_s, now_s
        guess = 2**31 if self._next is None else int(self._next + self._steps_per_s * passed_s) - MAX_STEPS
        request = urllib.request.Request(f"{self._server['url'].rstrip('/')}/steps?after={max(0, guess)}")
        if self._server["authorization"]:
            request.add_header("Authorization", self._server["authorization"])
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                told = json.load(answer)
            steps, following = told["steps"], told["next"]
            if self._next is not None:
                self._steps_per_s = max(0.0, (following - self._next) / passed_s)
                spent_s = sum(step["duration_s"] for step in steps)
                of = {
                    name: sum(step[name] * step["duration_s"] for step in steps) / spent_s if spent_s else 0.0
                    for name in ("num_rows", "num_dead_rows")
                }
                self._live.append(of["num_rows"])
                self._dead = of["num_dead_rows"]
                self._waiting = steps[-1]["queue_depth"] if steps else 0
            self._next = following
        except (OSError, ValueError, LookupError, TypeError):
            return

    def line(self) -> Text | None:
        """The last seconds as heights, and the newest in numbers."""
        if not self._live:
            return None
        slots = max(1, self._server["max_batch"])
        top = len(_HEIGHTS) - 1
        heights = "".join(_HEIGHTS[min(top, round(live / slots * top))] for live in self._live)
        words = f"batch {self._live[-1]:.1f} of {slots} live"
        words += f" · {self._dead:.1f} dead" if self._dead >= 0.05 else ""
        words += f" · {self._waiting} waiting · {self._steps_per_s:,.0f} steps/s"
        return Text.assemble((words, "cyan"), "\n", (heights, "cyan"))


def picture(told: dict[str, Any], age_s: float, batch: Batch) -> RenderableType:
    """`age_s` is how long ago `told` was said; times left run down meanwhile."""
    parts: list[RenderableType] = []
    if "total" in told:
        bar = Table.grid(expand=True)  # a bar by itself ends no line
        bar.add_row(ProgressBar(told["total"], told["done"]))
        parts.append(bar)
        parts.append(Text(" · ".join((f"{told['done']}/{told['total']} requests", *told["facts"]))))
        if (line := batch.line()) is not None:
            parts.append(line)
    else:
        parts.append(Text(told["notice"]))
    left = [
        f"{clock(told[name] - age_s)} left {of}"
        for name, of in (("left_s", "here"), ("all_left_s", "over all"))
        if told.get(name) is not None
    ]
    if left:
        parts.append(Text(" · ".join(left), style="bold"))
    return Panel(Group(*parts), title=Text(told["place"]) if told["place"] else None, title_align="left")


def clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    return f"{whole / 60:.0f} min" if whole < 6000 else f"{whole / 3600:.1f} h"


def main() -> None:
    # Ctrl-C and a closed terminal reach the whole group; the harness decides when the picture ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    batch, unread = Batch(), b""
    told: dict[str, Any] = {"place": "", "notice": "starting"}
    told_s = monotonic()
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while True:
            live.update(picture(told, monotonic() - told_s, batch), refresh=True)
            if select.select([sys.stdin], [], [], POLL_S)[0]:
                if not (read := os.read(sys.stdin.fileno(), 65536)):
                    return
                *lines, unread = (unread + read).split(b"\n")
                for line in map(json.loads, lines):
                    if "said" in line:
                        live.console.print(Text(line["said"]))
                    else:
                        told, told_s = line, monotonic()
            batch.follow(told.get("server", {}))
            batch.poll()


if __name__ == "__main__":
    main()
