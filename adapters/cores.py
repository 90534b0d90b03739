"""How many cores there are to compute on, and what a container's CPU quota leaves of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores this process may use, hyper-threads counted once; at most what a CPU quota pays for in full."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    paid = usable if quota is None else max(1, math.floor(quota))
    return min(psutil.cpu_count(logical=False) or usable, usable, paid)


def default_threads() -> int:
    """The default number of engine threads: one core is left to harness and API, if there are two."""
    return max(1, usable_cores() - 1)


def cpu_quota() -> float | None:
    """CPU seconds a second that the cgroups of this process allow (`--cpus=2`); None without a limit."""
    quotas: list[float] = []
    for folder in _folders():
        try:
            if (file := folder / "cpu.max").is_file():  # v2: "200000 100000" or "max 100000"
                allowed, period = file.read_text(encoding="ascii").split()
            else:
                allowed = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
                period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
            if allowed.strip() not in ("max", "-1"):
                quotas.append(int(allowed) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)


def throttled_s() -> float | None:
    """Seconds for which a quota has kept processes of this container from running; None without a quota."""
    for folder in _folders():
        try:
            lines = (folder / "cpu.stat").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        told = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
        if "throttled_usec" in told:
            return told["throttled_usec"] / 1e6
        if "throttled_time" in told:  # v1
            return told["throttled_time"] / 1e9
    return None


def _folders() -> Iterator[Path]:
    """The CPU cgroups of this process, from its own up to the root, as far as they can be seen here."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        own = Path(path.lstrip("/"))
        # A container may see its own cgroup as the root and be told the path of the host.
        yield from (root / part for part in (own, *own.parents))
