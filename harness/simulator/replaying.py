"""Holds the scheduler against the step log of a measured run: it plans every step of it once more.

A step is planned at its logged start, with the requests that were in the engine's inbox by then, and ends
at its logged end; its counts must be those of the log. Nobody stamps when a request comes into the inbox: it
is estimated from when the API received it. Where that puts a request on the wrong side of the start of a
step, the step differs, by order of arrival. What the engine saw is known as well: rows tell the step with
which each request began, and steps how many waited. Going on with that proves the reason, and without it a
request that joins one step late would be one token behind until it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import takewhile
from math import inf, nextafter
from typing import Any

import numpy as np
import pandas as pd

from adapters.base import BackendInfo, SamplingParams, Sequence, StepOutput
from harness.results.manifest import RunManifest
from harness.simulator.measured import fit_overheads, settings_of
from services.contract.requests import DEFAULT_PRIORITY
from services.engine.scheduler import Scheduler, StepPlan
from services.engine.spec import EngineSpec
from services.engine.step_plan import contexts
from services.strategies import VARIANTS

NEAR_S = 0.01
"""By so much the estimate of an arrival may be off."""
MOST_DIFFERING = 0.01
_TOKEN, _LAST_TOKEN = 1, 2
_COUNTS = ("num_rows", "num_dead_rows", "num_prompt_tokens", "num_decode_tokens", "num_preempted")
_CONTEXTS = ("num_prompt_chunks", "decode_context_tokens", "prompt_context_tokens")
_TO_THE_FIRST_STEP = ("received_s", "queue_s", "batch_wait_s")
_OF_ROWS = (*_TO_THE_FIRST_STEP, "group_id", "group_size", "num_prompt_tokens", "num_output_tokens")
_OF_STEPS = ("step", "queue_depth", *_COUNTS)
_Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Steps in a row that the scheduler plans otherwise than they are logged; `step` is the first one."""

    step: int
    num_steps: int
    reason: str | None
    """None where the order of arrival does not explain it."""


@dataclass(frozen=True, slots=True)
class StepReplay:
    num_steps: int
    differences: tuple[Difference, ...]

    @property
    def num_differing(self) -> int:
        return sum(difference.num_steps for difference in self.differences)

    @property
    def unexplained(self) -> Difference | None:
        """The first one."""
        return next((difference for difference in self.differences if difference.reason is None), None)

    @property
    def is_off(self) -> bool:
        return self.unexplained is not None or self.num_differing > MOST_DIFFERING * self.num_steps

    def text(self) -> str:
        told = f"{self.num_differing:,} of {self.num_steps:,} differ"
        if self.unexplained:
            return f"{told}, without a reason from step {self.unexplained.step} on !"
        return f"{told}, by arrival order" + (" !" if self.is_off else "") if self.differences else told


@dataclass(slots=True, eq=False)
class _Request:
    """The prompts of one HTTP request, and when it is in the inbox."""

    group_id: int
    sequences: list[dict[Hashable, Any]]
    told_s: float
    """By the estimate."""
    first_step: int
    """Of its first sequence to join: its place in the log."""
    seen_s: float
    """By the log, which knows between which two steps it was."""


@dataclass(frozen=True, slots=True)
class _Run:
    spec: EngineSpec
    info: BackendInfo
    steps: list[tuple[int, float, float, _Counts]]
    """Number, start, end, counts."""
    requests: list[_Request]
    """In the order of the estimates."""
    compared: tuple[str, ...]


def replay_steps(manifest: RunManifest, rows: pd.DataFrame, steps: pd.DataFrame) -> StepReplay | None:
    """None where it cannot be told: of several replays, of steps that were launched ahead or are missing,
    with a prefix cache or random predictions, which hang on the prompts, and without what this reads.
    """
    run = _read(manifest, rows, steps)
    if run is None:
        return None
    return StepReplay(len(run.steps), tuple(_differences(run)))


def num_unlike(manifest: RunManifest, rows: pd.DataFrame, steps: pd.DataFrame) -> int | None:
    """Steps that differ where estimates alone are played and nothing is put right; None as `replay_steps`."""
    run = _read(manifest, rows, steps)
    return None if run is None else sum(differs for differs, _ in _play(run, puts_right=False))


def _read(manifest: RunManifest, rows: pd.DataFrame, steps: pd.DataFrame) -> _Run | None:
    steps = steps.sort_values("start_s")
    spec = settings_of(manifest).engine_spec()
    reads_prompts = spec.policies.prefix_cache or spec.policies.length_oracle not in ("max_tokens", "exact")
    summaries = [entry.steps for entry in manifest.repeats]
    is_whole = len(summaries) == 1 and summaries[0] is not None and not summaries[0].num_dropped
    lacks = any(of[list(names)].isna().any(axis=None) for of, names in ((rows, _OF_ROWS), (steps, _OF_STEPS)))
    if reads_prompts or lacks or rows.empty or not is_whole:
        return None
    overheads = fit_overheads(rows, steps, spec.backend.max_batch_size)
    if overheads.overlaps:
        return None
    compared = _COUNTS + (_CONTEXTS if steps["num_prompt_chunks"].any() else ())
    starts_s = steps["start_s"].to_numpy(dtype=float)
    ends_s = starts_s + steps["duration_s"].to_numpy(dtype=float)
    counts = steps[list(compared)].itertuples(index=False, name=None)
    joined_s = sum(rows[name].to_numpy(dtype=float) for name in _TO_THE_FIRST_STEP)
    rows = rows.assign(first_step=np.searchsorted(starts_s, joined_s - 1e-6))
    requests = [
        _Request(
            int(group["group_id"].iloc[0]),
            group.to_dict("records"),
            at_s := float(group["received_s"].iloc[0]) + overheads.accept_s,
            int(group["first_step"].min()),
            at_s,
        )
        for _, group in rows.sort_values("schedule_index").groupby("group_id")
    ]
    requests.sort(key=lambda request: request.told_s)
    _see(requests, starts_s.tolist(), steps["queue_depth"].tolist())
    each = zip(steps["step"].tolist(), starts_s.tolist(), ends_s.tolist(), counts, strict=True)
    return _Run(spec, _info(manifest), list(each), requests, compared)


def _info(manifest: RunManifest) -> BackendInfo:
    """What the scheduler's limits read of the backend; padding was computed where the run asked for it."""
    assert manifest.service is not None
    card = manifest.service.model_dump()
    names = {entry.name for entry in fields(BackendInfo)}
    own = {name: value for name, value in card.items() if name in names}
    return BackendInfo(**own | {"model": manifest.model, "model_digest": "", "computes_padding": True})


def _see(requests: list[_Request], starts_s: list[float], depths: list[int]) -> None:
    """Move each arrival to between the two steps where the log has it, if it is not far from there.

    With a step have come those that began with it or before, and those that then wait.
    """
    begun = sorted(row["first_step"] for request in requests for row in request.sequences)
    num_come = np.searchsorted(begun, np.arange(len(starts_s)), side="right") + np.array(depths)
    first_steps = {request.first_step for request in requests}
    left, count = requests.copy(), 0
    for step, start_s in enumerate(starts_s):
        if count >= num_come[step] and step not in first_steps:
            continue
        come = [request for request in left if request.first_step <= step]
        left = [request for request in left if request.first_step > step]
        count += sum(len(request.sequences) for request in come)
        while left and count < num_come[step]:
            come.append(left.pop(0))
            count += len(come[-1].sequences)
        after_s = starts_s[step - 1] if step else -inf
        for request in come:
            seen_s = min(max(request.told_s, nextafter(after_s, inf)), start_s)
            if abs(seen_s - request.told_s) <= NEAR_S:
                request.seen_s = seen_s


class _Engine:
    """The scheduler, and who was given to it."""

    def __init__(self, run: _Run) -> None:
        spec = run.spec
        strategy = VARIANTS[spec.variant](spec.strategy)
        self.scheduler = Scheduler(strategy, spec.limits(run.info), (_LAST_TOKEN,), spec.policies)
        self.has: set[int] = set()
        self._num_tokens: dict[int, int] = {}

    @property
    def num_left(self) -> int:
        return self.scheduler.num_running + self.scheduler.queue_depth

    def plan(self, start_s: float, come: Iterable[_Request], wake: Iterable[_Request] = ()) -> StepPlan:
        """An engine that has nothing to do begins a step because one of `wake` has come."""
        for request in come:
            self._add(request)
        plan = self.scheduler.schedule(start_s)
        for request in wake:
            if plan.chunks:
                break
            self._add(request)
            plan = self.scheduler.schedule(start_s)
        return plan

    def take(self, plan: StepPlan, end_s: float) -> None:
        outputs = [
            StepOutput(chunk.seq.seq_id, [self._token(chunk.seq)]) for chunk in plan.chunks if chunk.samples
        ]
        self.scheduler.mark_launched(plan)
        self.scheduler.update_from_output(plan, outputs, end_s)

    def _token(self, seq: Sequence) -> int:
        is_last = len(seq.output_token_ids) + 1 == self._num_tokens[seq.seq_id]
        return _LAST_TOKEN if is_last else _TOKEN

    def _add(self, request: _Request) -> None:
        self.has.add(request.group_id)
        self.scheduler.add([self._sequence(row) for row in request.sequences])

    def _sequence(self, row: dict[Hashable, Any]) -> Sequence:
        seq_id = int(row["schedule_index"])
        self._num_tokens[seq_id] = int(row["num_output_tokens"])
        return Sequence(
            seq_id,
            [_TOKEN] * int(row["num_prompt_tokens"]),
            SamplingParams(max_tokens=int(row["max_tokens"])),
            priority=DEFAULT_PRIORITY if pd.isna(row["priority"]) else int(row["priority"]),
            group_id=int(row["group_id"]),
            group_size=int(row["group_size"]),
            arrival_s=float(row["received_s"]),
            client="" if pd.isna(row["user"]) else str(row["user"]),
        )


def _play(run: _Run, *, puts_right: bool) -> Iterator[tuple[bool, str | None]]:
    """Of each step whether it differs from the log, and the reason if there is one.

    Behind the last step of the log comes one that differs, where answers have not ended by then.
    """
    engine, left = _Engine(run), deque(run.requests)
    for _, start_s, end_s, logged in run.steps:
        while left and left[0].group_id in engine.has:
            left.popleft()
        near = [request for request in _by(start_s + NEAR_S, left) if request.group_id not in engine.has]
        told = [request for request in near if request.told_s <= start_s]
        seen = [request for request in near if request.seen_s <= start_s]
        late = near[len(told) :]
        reason = None
        if puts_right and told != seen:
            as_told = deepcopy(engine).plan(start_s, told, late)
            reason = None if _counts(as_told, run.compared) == logged else _reason(start_s, told, seen)
        plan = engine.plan(start_s, seen) if puts_right else engine.plan(start_s, told, late)
        is_logged = _counts(plan, run.compared) == logged
        yield not is_logged or reason is not None, reason if is_logged else None
        engine.take(plan, end_s)
    if engine.num_left or any(request.group_id not in engine.has for request in left):
        yield True, None


def _by(at_s: float, requests: Iterable[_Request]) -> Iterator[_Request]:
    return takewhile(lambda request: request.told_s <= at_s, requests)


def _counts(plan: StepPlan, names: tuple[str, ...]) -> _Counts:
    of_chunks = contexts(plan.chunks)
    return tuple(of_chunks[name] if name in of_chunks else getattr(plan, name) for name in names)


def _reason(start_s: float, told: list[_Request], seen: list[_Request]) -> str:
    """Who stands on one side of the start by the estimate, and on the other one in the log."""
    sides = (("before", "was not in it", told, seen), ("after", "was in it", seen, told))
    return ", ".join(
        f"request {request.sequences[0]['schedule_index']} came {1e3 * abs(start_s - request.told_s):.2f} ms "
        f"{side} its start by the estimate and {what}"
        for side, what, ones, others in sides
        for request in ones
        if request not in others
    )


def _differences(run: _Run) -> Iterator[Difference]:
    """Steps without a reason are one difference for as long as they follow one another."""
    numbers = [number for number, *_ in run.steps]
    numbers.append(numbers[-1] + 1)
    first, num = 0, 0
    for number, (differs, reason) in zip(numbers, _play(run, puts_right=True), strict=False):
        if num and not (differs and reason is None):
            yield Difference(first, num, None)
            num = 0
        if reason is not None:
            yield Difference(number, 1, reason)
        elif differs:
            first, num = first if num else number, num + 1
    if num:
        yield Difference(first, num, None)
