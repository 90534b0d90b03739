"""For all tests: no log is written to a stream that an earlier test had for itself, and that is closed."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _no_logs_to_closed_streams() -> None:
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler.stream.closed:
            root.removeHandler(handler)
