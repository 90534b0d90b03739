"""How many cores there are to compute on."""

from __future__ import annotations

import os

import psutil


def usable_cores() -> int:
    """Cores this process may use, hyper-threads counted once."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or usable, usable)


def default_threads() -> int:
    """The default number of engine threads: one core is left to harness and API, if there are two."""
    return max(1, usable_cores() - 1)
