"""`lab host-step`: what a decode step costs the host on CUDA, measured without a GPU.

The engine, the scheduler and the launching of steps are the real ones; the device is a stand-in that costs
nothing: a graph is replayed by doing nothing, an event is over at once. The device computes the step before
while the host does all this, so the host is in the way only where it takes longer than a step.

Sampling's operators are left out: on a GPU each is launched, some 45 for the temperature alone, 70 with
top_p and 110 with top_k. Whole steps are timed without the wrappers that time the parts. Each figure is the
least of several repeats, and of each the fastest tenth of its steps: a busy machine adds to all the others.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from functools import partial

import torch

from adapters.base import BackendInfo, SamplingParams, ScheduledChunk, Sequence, StepOutput
from adapters.text.detokenizer import PieceDetokenizer
from adapters.torch_backend.cuda import steps
from adapters.torch_backend.cuda.packing import DevicePacker
from adapters.torch_backend.cuda.sampling import NUM_FLOATS, NUM_INTS
from adapters.torch_backend.cuda.step_buffers import StepBuffer
from adapters.torch_backend.cuda.step_graphs import DecodeGraphs, graph_sizes
from adapters.torch_backend.model.attention import BLOCK
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.packing import StepPacker
from harness.results.table import render_table
from services.core.in_flight import InFlight
from services.core.metrics import Metrics
from services.core.outputs import RequestState
from services.engine.engine import Engine
from services.engine.limits import SchedulerLimits
from services.engine.messages import StepReport, Submit
from services.engine.scheduler import Scheduler
from services.engine_client.wire import pack, unpack
from services.strategies import VARIANTS
from services.strategies.base import StrategyConfig
from tools.profiling.step_profile import SelfTimes

_MAX_LEN, _VOCAB = 4096, 512
_PARTS: list[tuple[object, str, str]] = [
    (Scheduler, "schedule", "schedule"),
    (Scheduler, "mark_launched", "mark_launched"),
    (Scheduler, "update_from_output", "update_from_output"),
    (StepPacker, "plan", "plan"),
    (steps, "_sampling", "sampling settings"),
    (StepBuffer, "upload", "upload"),
    (steps.StepLauncher, "launch", "launch, the rest"),
    (steps.LaunchedStep, "result", "result"),
    (Engine, "step", "engine loop"),
]
_MODES = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "top_k, top_p": SamplingParams(temperature=0.8, top_k=20, top_p=0.95),
}


class _IdleMachine:
    """A `Machine`, a `StepGraph` and an `Event` that are done at once."""

    device = torch.device("cpu")
    attention = None

    def fused_ops(self) -> None: ...
    def make_current(self) -> None: ...
    def wait(self) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def replay(self) -> None: ...

    def free_bytes(self) -> int:
        return 0

    def pinned(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int64)

    def event(self) -> _IdleMachine:
        return self

    def graph(self) -> _IdleMachine:
        return self

    def capture(self, work: Callable[[], None]) -> None: ...


class _IdleBackend:
    """An `OverlappingBackend` that plans, uploads and downloads as on CUDA, and computes nothing."""

    def __init__(self, num_rows: int) -> None:
        self.info = BackendInfo(
            "torch", "none", "stand-in", "bf16", _VOCAB, (), num_rows, _MAX_LEN, num_rows * _MAX_LEN
        )
        machine, cache = _IdleMachine(), SlotCache(num_rows, _MAX_LEN)
        self._packer = packer = DevicePacker(machine, cache, _MAX_LEN, BLOCK)
        logits = torch.zeros(num_rows, _VOCAB, dtype=torch.bfloat16)

        def forward(ids: torch.Tensor, layout: object, rows: torch.Tensor) -> torch.Tensor:
            return logits[: len(rows)]

        decode_rows = partial(steps.decode_rows, packer, forward)
        graphs = DecodeGraphs(
            machine, decode_rows, graph_sizes(num_rows), cache.scratch_slot, NUM_INTS + NUM_FLOATS
        )
        with torch.inference_mode():
            graphs.capture()
        self._launcher = steps.StepLauncher(machine, packer, forward, graphs)

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        return self.launch(chunks).result()

    def launch(self, chunks: Seq[ScheduledChunk]) -> steps.LaunchedStep:
        return self._launcher.launch(self._packer.plan(chunks))

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self._packer.slots.release(seq_id)

    def close(self) -> None: ...


class _Api:
    """What the other process does with a report: decode it, count, detokenize; no HTTP."""

    def __init__(self, sequences: Seq[Sequence]) -> None:
        self._metrics = Metrics("continuous", "torch", "none")
        self._in_flight = InFlight(self._metrics)
        detokenizer = PieceDetokenizer(dict.fromkeys(range(_VOCAB), b" word"))
        self._states = [
            RequestState(str(seq.seq_id), [seq], [detokenizer.stream()], [], streamed=True)
            for seq in sequences
        ]
        for state in self._states:
            self._in_flight.add(state)

    def take(self, data: bytes) -> float:
        """Returns how long it took, in s; the writers' part is left out."""
        started_s = time.perf_counter()
        report = unpack(data)
        assert isinstance(report, StepReport)
        self._metrics.step(report)
        self._in_flight.update(report)
        took_s = time.perf_counter() - started_s
        for state in self._states:
            state.choices[0].take_output(0.0)
            state._changed.clear()
            state._num_unread_tokens = 0
        return took_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 64, 256], help="rows of a step (at most 256)"
    )
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a repeat")
    parser.add_argument("--repeats", type=int, default=7)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    columns: dict[str, dict[str, float]] = {}
    for mode, params in _MODES.items():
        for num_rows in args.rows:
            repeats = [_measure(num_rows, params, args.steps) for _ in range(args.repeats)]
            columns[f"{mode}, {num_rows}"] = {
                part: min(one.get(part, 0.0) for one in repeats) for part in {p for r in repeats for p in r}
            }
    parts = [*(part for _, _, part in _PARTS), "pack report", "whole step", "whole step, CPU", "API process"]
    lines = [[part, *(f"{column.get(part, 0.0) * 1e3:.3f}" for column in columns.values())] for part in parts]
    print("ms a decode step on the host, the device costing nothing")
    print(render_table(["part", *columns], lines))
    return 0


def _measure(num_rows: int, params: SamplingParams, num_steps: int) -> dict[str, float]:
    """In s, of the steps in which all rows decode."""
    found: dict[str, float] = {}
    for times in (SelfTimes(), None):  # the wrappers take a microsecond a call: whole steps go without
        with _wrapped(times):
            found |= _steps_of(num_rows, params, num_steps, times)
    return found


@contextmanager
def _wrapped(times: SelfTimes | None) -> Iterator[None]:
    """Sampling's operators do nothing, and the parts are timed if `times` is given."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _PARTS]
    before.append((steps, "sample_rows", getattr(steps, "sample_rows")))  # noqa: B009 - not its own name
    setattr(steps, "sample_rows", lambda logits, settings, *rest, **options: settings.row)  # noqa: B010
    if times is not None:
        for owner, name, part in _PARTS:
            setattr(owner, name, times.wrap(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def _steps_of(
    num_rows: int, params: SamplingParams, num_steps: int, times: SelfTimes | None
) -> dict[str, float]:
    rows: defaultdict[str, list[float]] = defaultdict(list)
    backend, reports = _IdleBackend(num_rows), []
    settings = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p")}
    sequences = [
        Sequence(
            i,
            list(range(1, 9)),
            SamplingParams(max_tokens=num_steps + 4, ignore_eos=True, seed=i, **settings),
            arrival_s=time.monotonic(),
        )
        for i in range(num_rows)
    ]
    api = _Api(sequences)
    encode = pack if times is None else times.wrap(pack, "pack report")
    limits = SchedulerLimits(
        num_rows * _MAX_LEN, _MAX_LEN, max_batch=num_rows, max_step_tokens=max(512, 16 * num_rows)
    )
    scheduler = Scheduler(VARIANTS["continuous"](StrategyConfig(max_batch=num_rows)), limits)
    engine = Engine(backend, scheduler, publish=lambda report: reports.append(encode(report)))
    engine.handle([Submit(sequences)])
    while scheduler.num_running or scheduler.queue_depth:
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        engine.step()
        took_s, took_cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
        parts = {} if times is None else times.take()
        parts |= {"whole step": took_s, "whole step, CPU": took_cpu_s}
        for data in reports:
            parts["API process"] = api.take(data)
        # The first turns compute prompts, the last ones end sequences.
        if all(3 < seq.num_steps < num_steps + 2 for seq in sequences):
            for part, seconds in parts.items():
                rows[part].append(seconds)
        reports.clear()
    return {part: sorted(values)[len(values) // 10] for part, values in rows.items()}
