"""One simulated run of one arm: the fleet that its settings describe, and its rows."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from adapters.base import BackendInfo, ConfigError
from harness.client.answer import Answer
from harness.plan.schedule import PlannedRequest, Schedule
from harness.results.record import ReplayLabels, Row, make_row
from harness.simulator.calibration import Calibration
from harness.simulator.costs import NullCost, StepWork
from harness.simulator.fleet import Fleet
from harness.simulator.fleet_spec import FleetOptions, FleetSpec, Flight
from services.contract.timings import StepRecord
from services.engine.spec import EngineSpec
from services.read_settings import read_settings
from services.settings import Settings


@dataclass(frozen=True, slots=True)
class Simulated:
    fleet: Fleet
    spec: FleetSpec
    settings: Settings
    flights: list[Flight]
    most: dict[str, int]
    """Of each count of `StepWork`, over all steps."""

    @property
    def steps(self) -> list[StepRecord]:
        """Of all replicas."""
        return [step for log in self.fleet.steps for step in log]


def read_arm(variant: str, own: Mapping[str, str], calibration: Calibration) -> Settings:
    """The settings of a service of this arm: its own, over the environment, over the calibration's.

    Raises:
        ConfigError: as the service itself would say it.
    """
    base = {name: value for name, value in calibration.base.items() if name not in os.environ}
    return read_settings(base | {"VARIANT": variant} | dict(own), env_file=None)


def simulate(
    settings: Settings,
    calibration: Calibration,
    schedule: Schedule,
    options: FleetOptions,
    *,
    num_prompt_tokens: Callable[[PlannedRequest], int] | None = None,
    on_end: Callable[[Flight], None] | None = None,
) -> Simulated:
    """Play the schedule. With `on_end` the flights are its to keep.

    Raises:
        ConfigError: the settings cannot work, or ask for a prefix cache, an engine's own scheduler, or a
            backend or model that was not calibrated.
    """
    engine: EngineSpec = settings.engine_spec()
    if settings.scheduling == "engine":
        raise ConfigError("SCHEDULING=engine is not simulated: nothing here knows an engine's own scheduler")
    _refuse_another_machine(settings, calibration)
    if engine.policies.prefix_cache:
        raise ConfigError("PREFIX_CACHE=1 is not simulated: nothing here knows which prompts begin alike")
    info: BackendInfo = calibration.backend_info(engine.backend)
    spec = FleetSpec(
        engine, info, calibration.cost, calibration.overheads, options,
        settings.max_queue, settings.max_queue_tokens,
    )  # fmt: skip
    flights: list[Flight] = []
    fleet = Fleet(
        spec, schedule, num_prompt_tokens or calibration.num_prompt_tokens, on_end or flights.append
    )
    # Nothing of a run is in a cycle, and the search for cycles takes a tenth of its time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        fleet.run()
    finally:
        if was_enabled:
            gc.enable()
    each = zip(*(replica.most for replica in fleet.replicas), strict=True)
    most = dict(zip(StepWork._fields, map(max, each), strict=True))
    return Simulated(fleet, spec, settings, flights, most)


def _refuse_another_machine(settings: Settings, calibration: Calibration) -> None:
    info, base = calibration.info, calibration.base
    known = {name: base.get(name.upper()) for name in ("backend", "model")}
    if not isinstance(calibration.cost, NullCost):
        known |= {"dtype": info["dtype"], "n_threads": info.get("num_threads")}
    for name, its in known.items():
        asked = getattr(settings, name)
        if asked in (None, "auto", its) or its is None:
            continue
        if name != "dtype" or _short(asked) != _short(its):
            raise ConfigError(
                f"{name.upper()}={asked} is not simulated: the calibration is of {its}; give one of {asked}"
            )


def _short(dtype: str) -> str:
    """Of the names that backends and DTYPE have for one number format, always the same."""
    return dtype.replace("float", "f").replace("fp", "f")


def make_rows(labels: ReplayLabels, flights: list[Flight]) -> list[Row]:
    return [make_row(labels, _answer(flight)) for flight in flights]


def _answer(flight: Flight) -> Answer:
    """The answer as the client would have seen it; tokens are counted, not named."""
    seq = flight.seq
    answer = Answer(flight.planned, flight.scheduled_s, flight.group_id, seq.group_size)
    answer.finish_s = flight.finish_s
    answer.error = flight.error
    if flight.replica < 0:
        return answer
    answer.sent_s = answer.written_s = flight.sent_s
    if flight.error is not None:
        return answer
    answer.chunk_s = flight.chunk_s
    answer.chunk_tokens = [1] * len(flight.chunk_s)
    answer.finish_reason = seq.finish_reason
    answer.num_prompt_tokens = seq.num_prompt_tokens
    answer.num_output_tokens = len(seq.output_token_ids)
    answer.timings = asdict(flight.timings) if flight.timings else {}
    answer.is_complete = True
    return answer
