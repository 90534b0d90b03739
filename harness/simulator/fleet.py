"""The event loop: users ask, the router chooses, replicas take their turns, answers come back.

All events are on one heap. At equal instants a message is in the inbox before the turn that could take it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any

from adapters.base import RequestTooLong, Sequence
from harness.plan.load_generator import Decision, LoadGenerator, TimedRequest
from harness.plan.schedule import PlannedRequest, Schedule
from harness.simulator.api_queue import ApiQueue, ApiRequest, Report
from harness.simulator.costs import ScaledCost
from harness.simulator.fast import FastReplica
from harness.simulator.fleet_spec import FleetSpec, Flight, SequenceMaker
from harness.simulator.operations import Autoscaler
from harness.simulator.replica import Replica, ReplicaSpec
from harness.simulator.routers import READS_WAITING, FleetView, make_router
from harness.simulator.step_log import StepRecords, StepTotals
from services.engine.messages import SequenceUpdate
from services.errors import ApiError
from services.strategies import VARIANTS

_ENDED, _NOTED, _FAILS, _READY, _SCALES, _ARRIVES, _WAKES, _ENTERS, _TURN = range(9)
"""Kinds of events, in the order in which they happen at one instant."""


class Fleet:
    """Plays one schedule. `on_end` gets each prompt when its answer has ended at the client."""

    def __init__(
        self,
        spec: FleetSpec,
        schedule: Schedule,
        num_prompt_tokens: Callable[[PlannedRequest], int],
        on_end: Callable[[Flight], None],
    ) -> None:
        self._takes_groups = VARIANTS[spec.engine.variant].takes_groups
        chunk = spec.engine.backend.max_batch_size if self._takes_groups else 1
        self.now_s = 0.0
        self.num_events = 0
        self.load = LoadGenerator(schedule, client_chunk=chunk, max_in_flight=spec.options.max_in_flight)
        self._make_sequence = SequenceMaker(num_prompt_tokens)
        self._on_end = on_end
        self._overheads = spec.overheads
        self._choose = make_router(spec.options.router)
        self._reads_waiting = spec.options.router in READS_WAITING
        self._view = FleetView(random=Random(spec.options.seed))
        self._info_delay_s = spec.options.info_delay_s
        self._flights: dict[int, Flight] = {}
        self._events: list[tuple[float, int, int, Any]] = []
        self._numbers, self._groups = count(), count()
        self._num_left = len(schedule.requests)
        self._spec = spec
        self._draws: dict[int, Random] = {}
        self._autoscaler = Autoscaler(spec.options.autoscaling) if spec.options.autoscaling else None
        self._num_open: list[int] = []
        self._leaving: set[int] = set()
        self.totals = StepTotals()
        """Of all replicas, where no step is kept."""
        self.steps: list[StepRecords] = []
        """Of each replica, over its restarts; empty in a brief run."""
        self.replicas: list[Replica] = []
        self._queues: list[ApiQueue] = []
        self.replica_s = 0.0
        """Over all replicas, from their start to their end: what is paid for."""
        for _ in range(spec.options.num_replicas):
            self._ready(self._add())

    def _start(self, index: int) -> Replica:
        spec = self._spec
        scale = spec.options.cost_scales[index % len(spec.options.cost_scales)]
        cost = spec.cost if scale == 1 else ScaledCost(spec.cost, scale)
        on_tokens = None if spec.options.brief else self._got_tokens
        one = ReplicaSpec(spec.engine, spec.info, cost, spec.overheads, self._reported, on_tokens)
        # Steps at a tick are not alike, nor are those of batches that pad their prompts, or of two at a time.
        is_exact = spec.options.exact or spec.engine.tick_s > 0 or spec.engine.pad_style == "generate"
        is_exact |= spec.overheads.overlaps
        steps = self.totals if spec.options.brief else self.steps[index]
        return (Replica if is_exact else FastReplica)(index, one, steps)

    def _empty_queue(self) -> ApiQueue:
        return ApiQueue(self._spec.max_queue, self._spec.max_queue_tokens)

    def _add(self) -> int:
        """One replica more, which takes no requests yet."""
        index = len(self.replicas)
        if not self._spec.options.brief:
            self.steps.append(StepRecords())
        self.replicas.append(self._start(index))
        self._queues.append(self._empty_queue())
        self._view.add()
        self._num_open.append(0)
        self.replica_s -= self.now_s
        return index

    def _ready(self, index: int) -> None:
        if self.replicas[index].is_gone:
            most = self.replicas[index].most
            self.replicas[index] = self._start(index)
            self.replicas[index].most = most
            self._queues[index] = self._empty_queue()
        insort(self._view.up, index)
        if failures := self._spec.options.failures:
            draws = self._draws.setdefault(index, failures.draws(self._spec.options.seed, index))
            self._push(self.now_s + draws.expovariate(1 / failures.every_s), _FAILS, index)

    def _fails(self, index: int) -> None:
        """Answers that have begun are cut off; the others are asked for again."""
        assert self._spec.options.failures is not None
        if index in self._leaving:
            return
        now_s, view = self.now_s, self._view
        self.replicas[index].fail(now_s)
        view.up.remove(index)
        view.waiting[index] = 0
        self._push(now_s + self._spec.options.failures.for_s, _READY, index)
        cut: list[Flight] = []
        again: dict[int, list[Flight]] = {}
        for flight in [flight for flight in self._flights.values() if flight.replica == index]:
            self._forget(flight)
            seen = [stamp_s for stamp_s in flight.chunk_s if stamp_s <= now_s]
            if seen or flight.error is not None:
                flight.chunk_s, flight.finish_s, flight.timings = seen, now_s, None
                flight.error = flight.error or "its replica failed"
                cut.append(flight)
            else:
                seq = self._make_sequence(flight.planned, flight.group_id)
                again.setdefault(flight.group_id, []).append(replace(flight, seq=seq, chunk_s=[]))
        for group in again.values():
            self._dispatch(group)
        for flight in cut:
            self._done(flight)

    def _scales(self) -> None:
        assert self._autoscaler is not None
        assert self._spec.options.autoscaling is not None
        policy, view = self._spec.options.autoscaling, self._view
        num_now = len(self.replicas) - len(self._leaving)
        num_sequences = sum(replica.num_sequences for replica in self.replicas if not replica.is_gone)
        wanted = self._autoscaler.num_replicas(self.now_s, num_sequences, num_now)
        for _ in range(wanted - num_now):
            self._push(self.now_s + policy.start_up_s, _READY, self._add())
        if wanted < num_now and len(view.up) > 1:
            index = view.up.pop()
            self._leaving.add(index)
            self._leave_if_idle(index)
        self._push(self.now_s + policy.every_s, _SCALES, None)

    def _leave_if_idle(self, index: int) -> None:
        if index in self._leaving and not self._num_open[index]:
            self.replica_s += self.now_s

    def run(self) -> None:
        """Play until the last answer has ended."""
        events = self._events
        for decision in self.load.start(0.0):
            self._follow(decision)
        self._plan_arrival()
        if self._spec.options.autoscaling:
            self._push(self._spec.options.autoscaling.every_s, _SCALES, None)
        while self._num_left:
            assert events, "prompts wait and nobody will ever call them"
            self.now_s, kind, _, what = heappop(events)
            if kind == _TURN:
                if what.wakes_at_s == self.now_s:  # else it was moved
                    what.turn(self.now_s)
                    if what.wakes_at_s is not None:
                        self._push(what.wakes_at_s, _TURN, what)
            elif kind == _ENDED:
                self._ended(what)
            elif kind == _NOTED:
                what()
            elif kind == _ARRIVES:
                self._follow(self.load.arrive())
                self._plan_arrival()
            elif kind == _WAKES:
                self._follow(self.load.wake(what, self.now_s))
            elif kind == _SCALES:
                self._scales()
            elif kind == _ENTERS:
                if self._flights.get(what[0].seq.seq_id) is what[0]:  # else its replica failed
                    self._enter(what, self.now_s)
            else:
                (self._fails if kind == _FAILS else self._ready)(what)
        self.num_events = next(self._numbers) - len(events)
        self.replica_s += self.now_s * (len(self.replicas) - len(self._leaving))

    def _push(self, at_s: float, kind: int, what: Any) -> None:
        heappush(self._events, (at_s, kind, next(self._numbers), what))

    def _plan_arrival(self) -> None:
        at_s = self.load.next_arrival_s
        if at_s is not None:
            self._push(at_s, _ARRIVES, None)

    def _follow(self, decision: Decision) -> None:
        for request in decision.drop:
            flight = self._flight(request, -1)
            flight.error = "not sent: too many requests were already in flight"
            self._num_left -= 1
            self._on_end(flight)
        for request in decision.later:
            self._push(request.scheduled_s, _WAKES, request)
        if decision.send:
            group_id = next(self._groups)
            self._dispatch([self._flight(request, group_id) for request in decision.send])

    def _dispatch(self, flights: list[Flight]) -> None:
        """All prompts of one HTTP request, to one replica."""
        view = self._view
        received_s = self.now_s + self._overheads.submit_s
        index = self._choose(view, flights[0].planned) if view.up else -1
        sequences = [flight.seq for flight in flights]
        for flight in flights:
            seq, flight.replica = flight.seq, index
            seq.arrival_s, seq.group_size = received_s, len(sequences)
            self._flights[seq.seq_id] = flight
        if index < 0:
            self._refuse(flights, "no replica was up", received_s)
            return
        view.note(index, len(sequences), sum([seq.max_total_tokens for seq in sequences]))
        self._num_open[index] += len(sequences)
        self._enter(flights, received_s)

    def _enter(self, flights: list[Flight], received_s: float) -> None:
        """The API of their replica gives them to the engine, or refuses them.

        Where too much waits now, that is asked again when the API gets to them: some may have begun by then.
        """
        replica = self.replicas[flights[0].replica]
        sequences = [flight.seq for flight in flights]
        begins_s = max(received_s, replica.accepts_at_s)
        limits, queue = replica.scheduler.limits, self._queues[replica.index]
        try:
            request = queue.accept(sequences, self.now_s, limits, together=self._takes_groups)
        except RequestTooLong as error:
            self._refuse(flights, str(error), received_s)
            return
        except ApiError as error:
            if begins_s > self.now_s:
                self._push(begins_s, _ENTERS, flights)
            else:
                self._refuse(flights, f"http {error.status}: {error.code}: {error.message}", received_s)
            return
        for flight in flights:
            flight.request = request
        replica.accepts_at_s = begins_s + self._overheads.accept_s
        if (wakes_at_s := replica.submit(replica.accepts_at_s, sequences)) is not None:
            self._push(wakes_at_s, _TURN, replica)

    def _refuse(self, flights: list[Flight], error: str, at_s: float) -> None:
        for flight in flights:
            flight.error, flight.finish_s = error, at_s
            self._push(at_s, _ENDED, flight)

    def _flight(self, request: TimedRequest, group_id: int) -> Flight:
        seq = self._make_sequence(request.planned, group_id)
        return Flight(request.planned, request.scheduled_s, self.now_s, group_id, seq, self.now_s)

    def _reported(
        self, replica: Replica, updates: Seq[SequenceUpdate], rows: int, depth: int, done_s: float
    ) -> None:
        stamp_s = done_s + self._overheads.deliver_s(rows)
        flights, num_ended = self._flights, 0
        begun: list[ApiRequest] = []
        for update in updates:
            flight = flights[update.seq_id]
            flight.chunk_s.append(stamp_s)
            request = flight.request
            if request and not request.has_begun:
                request.has_begun = True
                begun.append(request)
            if update.finish_reason is not None:
                num_ended += 1
                flight.error, flight.timings = update.error, update.timings
                flight.finish_s = stamp_s
                self._push(stamp_s, _ENDED, flight)
        queue, scheduler = self._queues[replica.index], replica.scheduler
        num_prefilling = 0
        if queue.num_unbegun > len(begun):
            prefilling = {flights[seq_id].request for seq_id in scheduler.prefilling_seq_ids()}
            num_prefilling = sum([not request.has_begun for request in prefilling if request])
        queue.report(Report(done_s, begun, num_ended, scheduler.num_running, num_prefilling))
        if self._reads_waiting:
            self._push(done_s + self._info_delay_s, _NOTED, lambda: self._note_waiting(replica, depth))

    def _note_waiting(self, replica: Replica, depth: int) -> None:
        if not replica.is_gone:
            self._view.waiting[replica.index] = depth

    def _got_tokens(self, replica: Replica, live: Seq[Sequence], ends_s: Seq[float], rows: int) -> None:
        deliver_s = self._overheads.deliver_s(rows)
        stamps_s = [end_s + deliver_s for end_s in ends_s]
        for seq in live:
            self._flights[seq.seq_id].chunk_s += stamps_s

    def _ended(self, flight: Flight) -> None:
        if self._flights.get(flight.seq.seq_id) is not flight:
            return  # its replica failed before the client had all of it
        self._forget(flight, self._info_delay_s)
        self._done(flight)

    def _forget(self, flight: Flight, delay_s: float = 0.0) -> None:
        """The answer has ended, which the router learns this much later."""
        del self._flights[flight.seq.seq_id]
        index, num_tokens, view = flight.replica, flight.seq.max_total_tokens, self._view
        if index < 0:
            return
        self._num_open[index] -= 1
        if delay_s > 0:
            self._push(self.now_s + delay_s, _NOTED, lambda: view.note(index, -1, -num_tokens))
        else:
            view.note(index, -1, -num_tokens)

    def _done(self, flight: Flight) -> None:
        self._num_left -= 1
        self._on_end(flight)
        if self._leaving:
            self._leave_if_idle(flight.replica)
        self._follow(self.load.end(flight.finish_s))
