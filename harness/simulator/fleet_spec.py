"""What a fleet is made of, and one prompt on its way through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from adapters.base import BackendInfo, SamplingParams, Sequence
from harness.plan.schedule import PlannedRequest
from harness.simulator.api_queue import ApiRequest
from harness.simulator.costs import CostModel
from harness.simulator.operations import Autoscaling, Failures
from harness.simulator.overheads import Overheads
from services.contract.requests import DEFAULT_PRIORITY
from services.contract.timings import SequenceTimings
from services.engine.spec import EngineSpec


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What a simulation adds to the settings of a service."""

    num_replicas: int = 1
    router: str = "round_robin"
    info_delay_s: float = 0.0
    """How late the router learns of ends and queues."""
    seed: int = 0
    exact: bool = False
    """Every step an event of its own."""
    brief: bool = False
    """Of each answer only the first and the last stamp, of the steps only their sums."""
    max_in_flight: int = 1024
    cost_scales: tuple[float, ...] = (1.0,)
    """What a step costs on each replica, against the calibration; further replicas begin with the first
    again."""
    failures: Failures | None = None
    autoscaling: Autoscaling | None = None


@dataclass(frozen=True, slots=True)
class FleetSpec:
    engine: EngineSpec
    info: BackendInfo
    cost: CostModel
    overheads: Overheads
    options: FleetOptions
    max_queue: int
    max_queue_tokens: int


@dataclass(slots=True)
class Flight:
    """One prompt on its way."""

    planned: PlannedRequest
    scheduled_s: float
    sent_s: float
    group_id: int
    seq: Sequence
    finish_s: float
    replica: int = -1
    """-1 until it has one."""
    chunk_s: list[float] = field(default_factory=list)
    timings: SequenceTimings | None = None
    error: str | None = None
    request: ApiRequest | None = None
    """What the API knows of it, once it is accepted."""


class SequenceMaker:
    """Sequences of one length share a prompt, those of one budget their parameters: nobody changes them."""

    def __init__(self, num_prompt_tokens: Callable[[PlannedRequest], int]) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._seq_ids = count()
        self._prompts: dict[int, list[int]] = {}
        self._params: dict[int, SamplingParams] = {}

    def __call__(self, planned: PlannedRequest, group_id: int) -> Sequence:
        num_prompt_tokens = self._num_prompt_tokens(planned)
        prompt = self._prompts.get(num_prompt_tokens)
        if prompt is None:
            prompt = self._prompts[num_prompt_tokens] = [0] * num_prompt_tokens
        params = self._params.get(planned.max_tokens)
        if params is None:
            params = SamplingParams(max_tokens=planned.max_tokens, ignore_eos=True)
            self._params[planned.max_tokens] = params
        priority = DEFAULT_PRIORITY if planned.priority is None else planned.priority
        seq_id, client = next(self._seq_ids), planned.user or ""
        return Sequence(seq_id, prompt, params, group_id=group_id, priority=priority, client=client)
