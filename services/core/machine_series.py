"""The series of the processes and of the GPU. They are read when a page is written, and never in between.

`process_*` is the API's process. The engine computes in a process of its own, under `lab_engine_process_*`;
without one, both tell of the same process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector

from adapters.gpu import Gpu
from services.core.series import Number

_GPU_SERIES = {
    "utilization": (
        *("gauge", "lab_gpu_utilization_ratio"),
        "Share of time in which a kernel ran on the GPU, as NVML says.",
    ),
    "memory_used_bytes": (
        *("gauge", "lab_gpu_memory_used_bytes"),
        "Memory of the GPU in use, that of other processes included.",
    ),
    "memory_total_bytes": ("gauge", "lab_gpu_memory_total_bytes", "Memory of the GPU."),
    "power_watts": ("gauge", "lab_gpu_power_watts", "Power that the GPU draws."),
    "energy_joules": (
        *("counter", "lab_gpu_energy_joules"),
        "Energy that the GPU has used since its driver was loaded, for all who use it.",
    ),
}
"""By the field of `GpuReading`."""


class MachineSeries:
    def __init__(self) -> None:
        self.gpu = Gpu()
        self._processes = [ProcessCollector(registry=None)]

    def watch_engine(self, engine_pid: Callable[[], int | None]) -> None:
        self._processes.append(
            ProcessCollector("lab_engine", lambda: engine_pid() or os.getpid(), registry=None)
        )

    def collect(self, labels: Mapping[str, str]) -> Iterator[Metric]:
        for process in self._processes:
            for family in process.collect():
                family.samples = [sample._replace(labels=dict(labels)) for sample in family.samples]
                yield family
        reading = self.gpu.read()
        if reading is None:
            return
        for field, (kind, name, help_text) in _GPU_SERIES.items():
            value = getattr(reading, field)
            if value is not None:
                number = Number(kind, name, help_text)
                number.value = value
                yield number.family(labels)
