"""Threads follow what a container may use, not what its host has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from adapters import cores


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 cores; `own` is /proc/self/cgroup, the rest is /sys/fs/cgroup."""
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("allowed", "num_cores"), [("200000", 2), ("150000", 1), ("50000", 1), ("max", 64), ("6400000", 64)]
)
def test_a_quota_bounds_the_threads(host: Path, allowed: str, num_cores: int) -> None:
    write(host, own="0::/\n", cpu__max=f"{allowed} 100000\n")
    assert cores.usable_cores() == num_cores
    assert cores.default_threads() == max(1, num_cores - 1)


def test_the_smallest_quota_above_counts(host: Path) -> None:
    write(host, own="0::/pod/container\n")
    write(host / "pod", cpu__max="300000 100000\n")
    write(host / "pod" / "container", cpu__max="max 100000\n")
    assert cores.cpu_quota() == 3.0


def test_a_path_of_the_host_falls_back_to_what_is_seen(host: Path) -> None:
    write(host, own="0::/../elsewhere\n", cpu__max="200000 100000\n")
    assert cores.cpu_quota() == 2.0


@pytest.mark.parametrize(("allowed", "quota"), [("400000", 4.0), ("-1", None)])
def test_version_1_of_cgroups(host: Path, allowed: str, quota: float | None) -> None:
    write(host, own="9:memory:/a\n4:cpu,cpuacct:/docker/x\n")
    write(host / "cpu", cpu__cfs_quota_us=f"{allowed}\n", cpu__cfs_period_us="100000\n")
    write(host / "cpu", cpu__stat="nr_periods 9\nthrottled_time 2500000000\n")
    assert cores.cpu_quota() == quota
    assert cores.throttled_s() == 2.5


def test_a_host_without_cgroups_has_all_its_cores(host: Path) -> None:
    assert (cores.cpu_quota(), cores.throttled_s(), cores.usable_cores()) == (None, None, 64)
    write(host, own="0::/\n", cpu__max="nonsense\n", cpu__stat="throttled_usec 1500000\n")
    assert (cores.cpu_quota(), cores.throttled_s()) == (None, 1.5)
