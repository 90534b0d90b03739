"""The event loop: users ask, the router chooses, replicas take their turns, answers come back.

Four kinds of events on one heap. At equal instants a message is in the inbox before the turn that could take
it, whatever was planned first, so that the exact and the fast mode agree.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from adapters.base import BackendInfo, RequestTooLong, SamplingParams, Sequence
from harness.plan.load_generator import Decision, LoadGenerator, TimedRequest
from harness.plan.schedule import PlannedRequest, Schedule
from harness.simulator.costs import CostModel, StepWork
from harness.simulator.overheads import Overheads
from harness.simulator.replica import Replica
from harness.simulator.routers import READS_WAITING, FleetView, make_router
from harness.simulator.step_log import StepLog, StepRecords, StepTotals
from services.contract.timings import SequenceTimings
from services.engine.messages import SequenceUpdate
from services.engine.spec import EngineSpec
from services.strategies import VARIANTS

_ENDED, _NOTED, _ARRIVES, _SUBMITTED, _TURN = range(5)
"""Kinds of events, in the order in which they happen at one instant."""


@dataclass(frozen=True, slots=True)
class FleetSpec:
    engine: EngineSpec
    info: BackendInfo
    cost: CostModel
    overheads: Overheads = Overheads()  # noqa: RUF009 frozen
    num_replicas: int = 1
    router: str = "round_robin"
    info_delay_s: float = 0.0
    """How late the router learns of ends and queues."""
    seed: int = 0
    exact: bool = False
    """Every step an event of its own."""
    brief: bool = False
    """Of each answer only the first and the last stamp, of the steps only their sums."""


@dataclass(slots=True)
class Flight:
    """One prompt on its way."""

    planned: PlannedRequest
    scheduled_s: float
    sent_s: float
    group_id: int
    replica: int
    seq: Sequence
    chunk_s: list[float] = field(default_factory=list)
    finish_s: float = 0.0
    timings: SequenceTimings | None = None
    error: str | None = None


class _Submission(NamedTuple):
    replica: Replica
    sequences: list[Sequence]


class Fleet:
    """Plays one schedule. `on_end` gets each prompt when its answer has ended at the client."""

    def __init__(
        self,
        spec: FleetSpec,
        schedule: Schedule,
        num_prompt_tokens: Callable[[PlannedRequest], int],
        on_end: Callable[[Flight], None],
        *,
        max_in_flight: int = 1 << 60,
    ) -> None:
        self._takes_groups = VARIANTS[spec.engine.variant].takes_groups
        chunk = spec.engine.backend.max_batch_size if self._takes_groups else 1
        self._spec = spec
        self.steps: list[StepLog] = []
        """Of each replica."""
        self.replicas = [self._start(index) for index in range(spec.num_replicas)]
        self.now_s = 0.0
        self.num_events = 0
        self._load = LoadGenerator(schedule, client_chunk=chunk, max_in_flight=max_in_flight)
        self._num_prompt_tokens = num_prompt_tokens
        self._on_end = on_end
        self._overheads = spec.overheads
        self._choose = make_router(spec.router)
        self._reads_waiting = spec.router in READS_WAITING
        self._view = FleetView.of(spec.num_replicas, spec.seed)
        self._info_delay_s = spec.info_delay_s
        self._flights: dict[int, Flight] = {}
        self._events: list[tuple[float, int, int, object]] = []
        self._numbers, self._groups, self._seq_ids = count(), count(), count()
        self._prompts: dict[int, list[int]] = {}
        self._params: dict[int, SamplingParams] = {}

    def _start(self, index: int) -> Replica:
        spec = self._spec
        self.steps.append(StepTotals() if spec.brief else StepRecords())
        return Replica(
            index, spec.engine, spec.info, spec.cost, spec.overheads, self.steps[index],
            on_report=self._reported, on_tokens=None if spec.brief else self._got_tokens, exact=spec.exact,
        )  # fmt: skip

    @property
    def most(self) -> dict[str, int]:
        """Of each count of `StepWork`, over all steps."""
        each = zip(*(replica.backend.most for replica in self.replicas), strict=True)
        return dict(zip(StepWork._fields, map(max, each), strict=True))

    @property
    def hit_in_flight_cap(self) -> bool:
        return self._load.hit_in_flight_cap

    def run(self) -> None:
        """Play until the last answer has ended."""
        events, pop = self._events, heapq.heappop
        for decision in self._load.start(0.0):
            self._follow(decision)
        self._offsets = iter(self._load.offsets_s)
        self._plan_arrival()
        while events:
            self.now_s, kind, _, what = pop(events)
            self.num_events += 1
            if kind == _TURN:
                assert isinstance(what, Replica)
                if what.wakes_at_s == self.now_s:  # else it was moved
                    what.turn(self.now_s)
                    self._plan_turn(what)
            elif kind == _SUBMITTED:
                assert isinstance(what, _Submission)
                what.replica.submit(self.now_s, what.sequences)
                self._plan_turn(what.replica)
            elif kind == _ENDED:
                assert isinstance(what, Flight)
                self._ended(what)
            elif kind == _NOTED:
                assert callable(what)
                what()
            else:
                self._follow(self._load.arrive())
                self._plan_arrival()
        assert not self._flights, "prompts wait and nobody will ever call them"

    def _push(self, at_s: float, kind: int, what: object) -> None:
        heapq.heappush(self._events, (at_s, kind, next(self._numbers), what))

    def _plan_arrival(self) -> None:
        offset_s = next(self._offsets, None)
        if offset_s is not None:
            self._push(offset_s, _ARRIVES, None)

    def _plan_turn(self, replica: Replica) -> None:
        if replica.wakes_at_s is not None:
            self._push(replica.wakes_at_s, _TURN, replica)

    def _follow(self, decision: Decision) -> None:
        for request in decision.drop:
            flight = self._flight(request, -1, -1)
            flight.error = "not sent: too many requests were already in flight"
            self._on_end(flight)
        if decision.send:
            self._send(decision.send)

    def _send(self, requests: Seq[TimedRequest]) -> None:
        """All prompts of one HTTP request, to one replica."""
        view, overheads = self._view, self._overheads
        index = self._choose(view)
        replica, group_id = self.replicas[index], next(self._groups)
        flights = [self._flight(request, group_id, index) for request in requests]
        received_s = self.now_s + overheads.submit_s
        sequences = [flight.seq for flight in flights]
        for seq in sequences:
            seq.arrival_s = received_s
            seq.group_size = len(sequences)
            view.tokens[index] += seq.max_total_tokens
        view.outstanding[index] += len(sequences)
        try:
            replica.scheduler.limits.check(sequences, together=self._takes_groups)
        except RequestTooLong as error:
            for flight in flights:
                flight.error, flight.finish_s = str(error), received_s
                self._flights[flight.seq.seq_id] = flight
                self._push(received_s, _ENDED, flight)
            return
        self._flights.update((flight.seq.seq_id, flight) for flight in flights)
        replica.accepts_at_s = max(received_s, replica.accepts_at_s) + overheads.accept_s
        self._push(replica.accepts_at_s, _SUBMITTED, _Submission(replica, sequences))

    def _flight(self, request: TimedRequest, group_id: int, replica: int) -> Flight:
        planned, num_prompt_tokens = request.planned, self._num_prompt_tokens(request.planned)
        prompt = self._prompts.get(num_prompt_tokens)
        if prompt is None:  # one list for all prompts of a length: nobody changes it
            prompt = self._prompts[num_prompt_tokens] = [0] * num_prompt_tokens
        params = self._params.get(planned.max_tokens)
        if params is None:
            params = SamplingParams(max_tokens=planned.max_tokens, ignore_eos=True)
            self._params[planned.max_tokens] = params
        seq = Sequence(next(self._seq_ids), prompt, params, group_id=group_id)
        return Flight(planned, request.scheduled_s, self.now_s, group_id, replica, seq, finish_s=self.now_s)

    def _reported(
        self, replica: Replica, updates: Seq[SequenceUpdate], rows: int, depth: int, done_s: float
    ) -> None:
        stamp_s = done_s + self._overheads.deliver_s(rows)
        flights = self._flights
        for update in updates:
            flight = flights[update.seq_id]
            flight.chunk_s.append(stamp_s)
            if update.finish_reason is not None:
                flight.error, flight.timings = update.error, update.timings
                flight.finish_s = stamp_s
                self._push(stamp_s, _ENDED, flight)
        if self._reads_waiting and depth != self._view.waiting[replica.index]:
            self._note(lambda: self._view.waiting.__setitem__(replica.index, depth), done_s)

    def _got_tokens(self, replica: Replica, live: Seq[Sequence], ends_s: Seq[float], rows: int) -> None:
        deliver_s = self._overheads.deliver_s(rows)
        stamps_s = [end_s + deliver_s for end_s in ends_s]
        for seq in live:
            self._flights[seq.seq_id].chunk_s += stamps_s

    def _ended(self, flight: Flight) -> None:
        del self._flights[flight.seq.seq_id]

        def note() -> None:
            self._view.outstanding[flight.replica] -= 1
            self._view.tokens[flight.replica] -= flight.seq.max_total_tokens

        self._note(note, self.now_s)
        self._on_end(flight)
        self._follow(self._load.end(flight.finish_s))

    def _note(self, note: Callable[[], None], at_s: float) -> None:
        """The router learns of something that happened at `at_s`."""
        if self._info_delay_s <= 0 and at_s <= self.now_s:
            note()
        else:
            self._push(at_s + self._info_delay_s, _NOTED, note)
