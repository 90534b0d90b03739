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

    def utilization(self) -> float | None:
        share: float | None = self._ask(lambda nvml, of: nvml.nvmlDeviceGetUtilizationRates(of).gpu / 100)
        return share

    def energy_joules(self) -> float | None:
        energy: float | None = self._ask(lambda nvml, of: nvml.nvmlDeviceGetTotalEnergyConsumption(of) / 1000)
        return energy

    def read(self) -> GpuReading | None:
        """What the device says now; None where there is none."""
        if self._device is None:
            return None
        memory = self._ask(lambda nvml, device: nvml.nvmlDeviceGetMemoryInfo(device))
        return GpuReading(
            utilization=self.utilization(),
            memory_used_bytes=memory and memory.used,
            memory_total_bytes=memory and memory.total,
            power_watts=self._ask(lambda nvml, device: nvml.nvmlDeviceGetPowerUsage(device) / 1000),
            energy_joules=self.energy_joules(),
        )

    def _ask(self, question: Callable[[Any, Any], Any]) -> Any:
        """None where there is no device, or it does not tell."""
        if self._device is None:
            return None
        try:
            return question(self._nvml, self._device)
        except self._nvml.NVMLError:
            return None


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
