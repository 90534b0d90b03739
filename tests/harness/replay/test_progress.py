"""What is shown while a run goes on."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from harness.client.answer import Answer
from harness.plan.corpus import Prompt
from harness.plan.schedule import Arrivals, Load, make_schedule
from harness.replay import progress, screen
from harness.replay.progress import PlainReporter
from services.contract.timings import StepRecord
from services.core.step_log import StepLog

PROMPTS = [Prompt(id="p", prompt="x", max_tokens=3)]


@pytest.mark.parametrize(
    ("load", "in_flight"), [(Load(Arrivals.CLOSED, concurrency=3), 2), (Load(Arrivals.CONSTANT, rate=1e6), 2)]
)
def test_plain_lines_tell_all(load: Load, in_flight: int, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = make_schedule(PROMPTS, 4, load, seed=1)
    reporter = PlainReporter()
    reporter.begin("arm", schedule)
    for index, planned in enumerate(schedule.requests):
        answer = Answer(planned, scheduled_s=10.0, chunk_s=[10.5], num_output_tokens=3)
        answer.error = "http 500" if index == 1 else None
        if index == 2:
            assert reporter._tally is not None
            assert reporter._tally.facts()[0] == f"{in_flight} in flight"
            assert reporter._tally.left_s() is not None
        reporter.advance(answer)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("arm: 4/4 answered, 0 in flight, ")
    assert "TTFT p50 500 ms, 1 failed" in last


def test_runs_of_a_comparison_tell_the_time_left_over_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 100.0
    monkeypatch.setattr(progress, "perf_counter", lambda: now_s)
    schedule = make_schedule(PROMPTS, 4, Load(Arrivals.CLOSED, concurrency=1), seed=1)
    reporter = PlainReporter()
    reporter.start_run("block 1 of 1: a, run 1 of 3", 2)
    now_s = 110.0
    reporter.start_run("block 1 of 1: b, run 2 of 3", 1)
    reporter.begin("b", schedule)
    now_s = 116.0
    reporter.advance(Answer(schedule.requests[0], scheduled_s=10.0, chunk_s=[10.5], num_output_tokens=3))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("18 s left, 14 s over all"), last


def told(**more: Any) -> dict[str, Any]:
    facts = ["3 in flight", "1,204 tok/s", "TTFT p50 36 ms"]
    return {"place": "block 2 of 4: continuous, run 5 of 12", "done": 37, "total": 64, "facts": facts,
            "left_s": 12.0, "all_left_s": 200.0, **more}  # fmt: skip


@pytest.mark.parametrize("width", [24, 60, 200])
def test_the_picture_fits_and_tells_all(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(screen.picture(told(), 2.0, screen.Batch()))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in lines).split())
    for part in ("37/64 requests", "1,204 tok/s", "TTFT p50 36 ms", "10 s left here", "3 min left over all"):
        assert part in text


def test_the_batch_is_asked_for_once_a_second_and_for_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    log = StepLog()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(int(self.path.partition("after=")[2]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(log.page(asked[-1]))

        def log_message(self, *_: object) -> None: ...

    now_s = 50.0
    monkeypatch.setattr(screen, "monotonic", lambda: now_s)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    batch = screen.Batch()
    batch.follow({"url": f"http://127.0.0.1:{server.server_port}", "authorization": None, "max_batch": 8})
    for second in range(4):
        now_s = 50.0 + second
        for _ in range(3):
            batch.poll()
        for step in range(1000):
            log.add(StepRecord(step, second + step / 1000, 0.001, 6, 0, 6, num_dead_rows=1, queue_depth=9))
    server.shutdown()
    server.server_close()
    assert asked == [2**31, 0, 1968, 2968]  # at first the rate is unknown
    line = batch.line()
    assert line is not None
    assert line.plain.startswith("batch 6.0 of 8 live · 1.0 dead · 9 waiting · 1,000 steps/s")


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_the_terminal_is_left_clean(is_interrupted: bool) -> None:
    program = (
        "import time\n"
        "from harness.replay.progress import make_reporter\n"
        "try:\n"
        "    with make_reporter() as reporter:\n"
        "        reporter.start_run('block 1 of 1: here', 0)\n"
        f"        time.sleep({30 if is_interrupted else 2})\n"
        "except KeyboardInterrupt: pass\n"
        "print('the end')\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", program], {**os.environ, "TERM": "xterm"})
    written = b""
    with contextlib.suppress(OSError):  # the other side of the terminal is closed
        while read := os.read(terminal, 65536):
            written += read
            if is_interrupted and b"block 1 of 1: here" in written:
                is_interrupted = False
                os.write(terminal, b"\x03")
    os.waitpid(pid, 0)
    os.close(terminal)
    assert b"block 1 of 1: here" in written
    assert written.rfind(b"\x1b[?25h") > written.rfind(b"\x1b[?25l") >= 0  # the cursor is there again
    assert written.endswith(b"\x1b[2Kthe end\r\n")


def test_a_screen_that_stands_still_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[socket.socket] = []

    class NeverReads:
        def __init__(self, _: object, stdin: int) -> None:
            kept.append(socket.socket(fileno=os.dup(stdin)))

        def wait(self, _: float) -> None: ...
        def kill(self) -> None: ...

    monkeypatch.setattr(progress.subprocess, "Popen", NeverReads)
    with progress.LiveReporter() as reporter:
        for _ in range(20_000):
            reporter.announce("x" * 500)
    kept[0].close()
