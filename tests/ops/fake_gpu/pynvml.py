"""Stands for NVML in a service that a test starts: one GPU that is half busy."""

from __future__ import annotations

import time
from types import SimpleNamespace


class NVMLError(Exception):
    """What NVML raises."""


def nvmlInit() -> None: ...


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetUtilizationRates(device: int) -> SimpleNamespace:
    return SimpleNamespace(gpu=50)


def nvmlDeviceGetMemoryInfo(device: int) -> SimpleNamespace:
    return SimpleNamespace(used=1 << 30, total=80 << 30)


def nvmlDeviceGetPowerUsage(device: int) -> int:
    return 250_000


def nvmlDeviceGetTotalEnergyConsumption(device: int) -> int:
    return int(time.time() * 250_000) % (1 << 40)
