"""SIGINT and SIGTERM reach whoever listens, and the handlers of before come back."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest

from harness.replay.event_loop import loop_factory
from harness.replay.interrupts import on_interrupt, raise_interrupt

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_innermost_one_counts(number: signal.Signals) -> None:
    called: list[str] = []
    with on_interrupt(raise_interrupt):
        with on_interrupt(lambda: called.append("inner")):
            signal.raise_signal(number)
            signal.raise_signal(number)
        assert called == ["inner"] * 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("factory", [loop_factory(), asyncio.new_event_loop])
def test_a_loop_that_waits_is_woken(number: signal.Signals, factory: type) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        with on_interrupt(lambda: loop.call_soon_threadsafe(told.set)):
            threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, number)).start()
            await asyncio.wait_for(told.wait(), 10)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_off_the_main_thread_nothing_changes() -> None:
    seen: list[object] = []

    def other() -> None:
        with on_interrupt(raise_interrupt):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
