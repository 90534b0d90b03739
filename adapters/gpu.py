"""What the GPU says of itself through NVML; nothing where there is none, or no driver.

The device is the first that `CUDA_VISIBLE_DEVICES` names, else the first of the machine. NVML tells of the
device, so work of others on it is in every figure.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GpuReading:
    """None where this device or its driver does not tell."""

    utilization: float | None
    """Share of the last sample period (up to 1 s) in which a kernel ran, 0 to 1."""
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    power_watts: float | None
    energy_joules: float | None
    """Since the driver was loaded."""


class Gpu:
    def __init__(self, nvml: Any = None) -> None:
        """`nvml` is the module `pynvml`; None imports it."""
        self._nvml, self._device = _first_device(nvml)

    def read(self) -> GpuReading | None:
        """What the device says now; None where there is none."""
        nvml, device = self._nvml, self._device
        if device is None:
            return None

        def ask(question: Callable[[], float]) -> float | None:
            try:
                return question()
            except nvml.NVMLError:
                return None

        return GpuReading(
            utilization=ask(lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100),
            memory_used_bytes=ask(lambda: nvml.nvmlDeviceGetMemoryInfo(device).used),
            memory_total_bytes=ask(lambda: nvml.nvmlDeviceGetMemoryInfo(device).total),
            power_watts=ask(lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1000),
            energy_joules=ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000),
        )


def _first_device(nvml: Any) -> tuple[Any, Any]:
    """The module and the device, or None for both."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if named is None else named.split(",")[0].strip()
    if first in ("", "-1"):
        return None, None
    try:
        if nvml is None:
            nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        if first.isdecimal():
            return nvml, nvml.nvmlDeviceGetHandleByIndex(int(first))
        return nvml, nvml.nvmlDeviceGetHandleByUUID(first)
    except ImportError:
        return None, None
    except nvml.NVMLError:
        return None, None
