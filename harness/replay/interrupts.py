"""SIGINT and SIGTERM are the same request: end what is being measured and keep its rows.

`on_interrupt` says what that means at the moment, and the innermost one counts: `measure` raises
KeyboardInterrupt, a replay ends its requests in flight, a replay in several processes passes the signal on.
A second signal adds nothing while the first is being obeyed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = "interrupted: the harness was told to stop"


@contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM call `act` on the main thread; then the handlers of before are back.

    Off the main thread nothing changes: whoever runs there handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: act()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def raise_interrupt() -> None:
    raise KeyboardInterrupt
