"""The machine a run took place on, and what else it was doing meanwhile.

Only `/proc`, `/sys`, psutil, `nvidia-smi` and NVML are asked. What the system does not tell is None.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import perf_counter, process_time

import psutil

from adapters.cores import throttled_s
from adapters.gpu import Gpu
from harness.replay.host import host_facts
from harness.results.facts import MachineUse
from harness.results.manifest import HostFacts


def describe_host() -> HostFacts:
    return HostFacts(**host_facts())


@dataclass(frozen=True, slots=True)
class MachineSample:
    """Counters at one instant; `pid` is the service that the harness started, if it did."""

    wall_s: float
    harness_cpu_s: float
    service_cpu_s: float
    busy_s: float
    steal_s: float | None
    pid: int | None
    throttled_s: float | None = None
    gpu_joules: float | None = None

    @classmethod
    def take(cls, pid: int | None, gpu: Gpu | None = None) -> MachineSample:
        """`gpu` is None where the server computes on another machine."""
        times = psutil.cpu_times()
        # Guest time is already part of user time; idle, iowait and steal are nobody's work.
        counted = ("user", "nice", "system", "irq", "softirq")
        busy_s = sum(getattr(times, name, 0.0) for name in counted)
        return cls(
            wall_s=perf_counter(),
            harness_cpu_s=process_time() + _ended_children_cpu_s(),
            service_cpu_s=_tree_cpu_s(pid),
            busy_s=busy_s,
            steal_s=getattr(times, "steal", None),
            throttled_s=throttled_s(),
            gpu_joules=gpu.energy_joules() if gpu else None,
            pid=pid,
        )

    def use_since(self, earlier: MachineSample) -> MachineUse:
        wall_s = max(self.wall_s - earlier.wall_s, 1e-9)
        machine_s = wall_s * (psutil.cpu_count() or 1)
        harness_s = self.harness_cpu_s - earlier.harness_cpu_s
        other_share = None
        if self.pid is not None:
            ours_s = harness_s + self.service_cpu_s - earlier.service_cpu_s
            other_share = max(0.0, (self.busy_s - earlier.busy_s - ours_s) / machine_s)
        steal_share = None
        if self.steal_s is not None and earlier.steal_s is not None:
            steal_share = max(0.0, (self.steal_s - earlier.steal_s) / machine_s)
        throttled_share = None
        if self.throttled_s is not None and earlier.throttled_s is not None:
            throttled_share = max(0.0, self.throttled_s - earlier.throttled_s) / wall_s
        gpu_joules = None
        if self.gpu_joules is not None and earlier.gpu_joules is not None:
            gpu_joules = self.gpu_joules - earlier.gpu_joules
        return MachineUse(
            steal_share=steal_share,
            other_cpu_share=other_share,
            harness_cpu_share=harness_s / wall_s,
            harness_total_cpu_share=harness_s / wall_s,
            busy_share=(self.busy_s - earlier.busy_s) / machine_s,
            throttled_share=throttled_share,
            gpu_joules=gpu_joules,
        )


def _ended_children_cpu_s() -> float:
    """Of the processes that sent parts of the schedule: a service is still there when this is asked."""
    times = os.times()
    return times.children_user + times.children_system


def _tree_cpu_s(pid: int | None) -> float:
    """CPU seconds of a process and everything it started that is still there."""
    if pid is None:
        return 0.0
    total_s = 0.0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            times = process.cpu_times()
            total_s += times.user + times.system
    except psutil.Error:
        return total_s
    return total_s
