"""GPU figures: from a made-up NVML, since no test can count on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from adapters.gpu import Gpu, GpuReading


class NVMLError(Exception):
    pass


def fake_nvml(**changes: Any) -> SimpleNamespace:
    calls: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=75),
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(used=1 << 30, total=80 << 30),
        "nvmlDeviceGetPowerUsage": lambda device: 300_500,
        "nvmlDeviceGetTotalEnergyConsumption": lambda device: 12_000 + (device == "GPU-1"),
    }
    return SimpleNamespace(**(calls | changes))


def fail(*_: object) -> float:
    raise NVMLError


def test_units_are_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Gpu(fake_nvml()).read() == GpuReading(0.75, 1 << 30, 80 << 30, 300.5, 12.0)


def test_what_a_device_does_not_tell_is_none() -> None:
    reading = Gpu(fake_nvml(nvmlDeviceGetTotalEnergyConsumption=fail)).read()
    assert reading is not None
    assert (reading.energy_joules, reading.power_watts) == (None, 300.5)


def test_no_driver_and_no_device_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Gpu(fake_nvml(nvmlInit=fail)).read() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Gpu(fake_nvml()).read() is None


def test_the_device_is_the_first_that_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-0")
    reading = Gpu(fake_nvml()).read()
    assert reading is not None
    assert reading.energy_joules == 12.001
