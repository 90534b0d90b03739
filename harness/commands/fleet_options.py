"""The options of `lab simulate` and `lab plan` that describe a fleet, and where its costs come from."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from math import inf
from pathlib import Path
from typing import Any

from adapters.base import ConfigError
from harness.settings import OF_COMPARE, HarnessSettings
from harness.simulator.calibration import DEFAULT, Calibration, null_calibration, read_calibration
from harness.simulator.fleet_spec import FleetOptions
from harness.simulator.measured import calibrate
from harness.simulator.operations import Autoscaling, Failures
from harness.simulator.roofline import Hardware, roofline

OF_REAL_RUNS = OF_COMPARE.union(
    {
        *("variant", "backend", "model", "repeats", "url", "warmup", "floor", "processes", "shard"),
        *("start_at", "start_timeout_s", "request_timeout_s", "temperature", "ignore_eos", "salt"),
    }
)
"""Settings of the harness that a virtual clock has no use for."""


def add_fleet_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--calibrate", default=str(DEFAULT), metavar="FROM",
        help="a calibration (.json), a measured RUN.parquet with its step log, null, or the data sheet of a "
        "device: roofline:lab-8b,gb_per_s=4800,tflops=989,memory_gb=141 (default: lab-26m on 2 cores)",
    )  # fmt: skip
    add("--allow-busy", action="store_true", help="calibrate on a run whose machine was not quiet")
    add(
        "--info-delay-ms", type=float, default=0.0, metavar="MS",
        help="how late the router learns of ends and queues (default 0)",
    )  # fmt: skip
    add(
        "--cost-scales", type=float, nargs="+", default=[1.0], metavar="X",
        help="what a step costs on each replica, against the calibration: 1 1 2.5, over and over (default 1)",
    )  # fmt: skip
    add(
        "--failures", type=_of(Failures), metavar="NUMBERS",
        help="replicas fail at random and come back: every_s=3600,for_s=60 (mean time between failures of "
        "one, time until it is back)",
    )  # fmt: skip
    add(
        "--autoscale", type=_of(Autoscaling), metavar="NUMBERS",
        help="replicas follow the load: target=12 (running and waiting sequences of each), and, if others "
        "than in docker/k8s, least, most, every_s, down_window_s, down_every_s, start_up_s",
    )  # fmt: skip


def add_price_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--price-per-hour", "--price-per-hour-usd", type=float, metavar="USD", dest="price_per_hour_usd",
        help="price of one replica (default PRICE_PER_HOUR_USD)",
    )  # fmt: skip


def fleet_options(
    args: argparse.Namespace,
    settings: HarnessSettings,
    *,
    replicas: int,
    router: str,
    exact: bool = False,
    brief: bool = False,
) -> FleetOptions:
    """
    Raises:
        ConfigError: a number is out of range.
    """
    if replicas < 1:
        raise ConfigError(f"--replicas must be at least 1, not {replicas}")
    if not 0 <= args.info_delay_ms < inf or not all(0 < scale < inf for scale in args.cost_scales):
        raise ConfigError("--info-delay-ms must be 0 or more, and each of --cost-scales above 0")
    return FleetOptions(
        replicas, router, args.info_delay_ms / 1000, settings.seed, exact, brief,
        settings.max_in_flight, tuple(args.cost_scales), args.failures, args.autoscale,
    )  # fmt: skip


def read_source(source: str, *, allow_busy: bool) -> Calibration:
    """
    Raises:
        ConfigError: it is none of the four, or cannot be used.
    """
    if source.startswith("roofline:"):
        model, _, numbers = source.removeprefix("roofline:").partition(",")
        try:
            return roofline(model, _of(Hardware)(numbers))
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--calibrate {source}: {error}") from error
    if source == "null":
        return null_calibration()
    path = Path(source)
    return calibrate(path, allow_busy=allow_busy) if path.suffix == ".parquet" else read_calibration(path)


def _of(made: Callable[..., Any]) -> Callable[[str], Any]:
    """Reads the fields of a dataclass, as `name=number,name=number`."""

    def read(text: str) -> Any:
        kinds = {field.name: field for field in fields(made)}  # type: ignore[arg-type]
        given: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in kinds:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(kinds)}")
            try:
                given[name] = int(value) if kinds[name].type == "int" else float(value)
            except ValueError:
                given[name] = -1
            if not 0 <= given[name] < float("inf") or (not given[name] and name != "start_up_s"):
                raise argparse.ArgumentTypeError(f"{name} must be a number above 0, not {value!r}")
        missing = [name for name, kind in kinds.items() if kind.default is MISSING and name not in given]
        if missing:
            raise argparse.ArgumentTypeError(f"{', '.join(missing)} must be given")
        try:
            return made(**given)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def print_origin(calibration: Calibration, most: Mapping[str, int]) -> None:
    """What simulated figures rest on, and where they went beyond it. `most`: the largest step, by feature."""
    print(f"\nSIMULATED, not measured: {calibration.in_words()}")
    for doubt in (*calibration.outside(most), *calibration.notes):
        print(f"  caution: {doubt}")
