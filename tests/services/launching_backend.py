"""A backend that computes on a virtual device while its caller plans, and forgives nothing.

A token is a hash of all tokens of its sequence, so equal prompts give equal answers in any company; some
tokens end an answer. Inputs that only the step before can tell are taken from there. A wrong start, a slot
too many, a third step in flight, a result out of order, a penalty on an unknown token: each is an error here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from adapters.base import BackendError, BackendInfo, ScheduledChunk, StepOutput
from tests.services.virtual_time import Clock

EOS = 0
GARBAGE = 99
STEP_S = 0.1


@dataclass(slots=True)
class _Slot:
    num_tokens: int = 0
    digest: int = 0
    last_token: int = GARBAGE
    last_step: int = -1


class LaunchedStep:
    def __init__(self, backend: LaunchingBackend, number: int, outputs: list[StepOutput]) -> None:
        self._backend = backend
        self._number = number
        self._outputs = outputs
        self._done_s = max(backend.clock.now_s, backend.free_at_s) + STEP_S
        backend.free_at_s = self._done_s

    def result(self) -> list[StepOutput]:
        backend = self._backend
        assert backend.in_flight[0] == self._number, "results are asked for in the order of launching"
        backend.in_flight.pop(0)
        backend.log.append(("result", self._number))
        backend.clock.now_s = max(backend.clock.now_s, self._done_s)
        if self._number in backend.fails_in_result:
            raise BackendError("numbers ran out")
        return self._outputs


class LaunchingBackend:
    """Launches are numbered from 0. `log` has each launch, result and release in the order of the calls."""

    def __init__(self, clock: Clock, max_batch: int, *, eos_one_in: int = 12, launch_s: float = 0.0) -> None:
        self.clock = clock
        self.free_at_s = 0.0
        self.in_flight: list[int] = []
        self.num_launched = 0
        self.max_in_flight = 0
        self.log: list[tuple[str, int]] = []
        self.rows: list[list[tuple[int, bool]]] = []
        self.on_launch: Callable[[], None] = lambda: None
        """Called when a launch is about to return."""
        self.fails_in_launch: set[int] = set()
        self.fails_in_result: set[int] = set()
        self._eos_one_in = eos_one_in
        self._launch_s = launch_s
        self._slots: dict[int, _Slot] = {}
        self.info = BackendInfo("launching", "none", "none", "none", 100, (EOS,), max_batch, 1000, 10_000)

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        return self.launch(chunks).result()

    def launch(self, chunks: Seq[ScheduledChunk]) -> LaunchedStep:
        number = self.num_launched
        self.num_launched += 1
        self.clock.now_s += self._launch_s
        self.log.append(("launch", number))
        self.rows.append([(chunk.seq.seq_id, chunk.dead) for chunk in chunks])
        if number in self.fails_in_launch:
            raise BackendError("it would not start")
        self.in_flight.append(number)
        self.max_in_flight = max(self.max_in_flight, len(self.in_flight))
        assert len(self.in_flight) <= 2, "two steps are launched and a third is asked for"
        outputs = [self._compute(chunk, number) for chunk in chunks]
        assert len(self._slots) <= self.info.max_batch_size, "no slot is left"
        step = LaunchedStep(self, number, [output for output in outputs if output])
        self.on_launch()
        return step

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self.log.append(("release", seq_id))
            self._slots.pop(seq_id, None)

    def close(self) -> None:
        assert not self.in_flight

    @property
    def num_slots_in_use(self) -> int:
        return len(self._slots)

    def _compute(self, chunk: ScheduledChunk, number: int) -> StepOutput | None:
        seq = chunk.seq
        slot = self._slots.setdefault(seq.seq_id, _Slot())
        if chunk.dead:
            assert chunk.start == slot.num_tokens - 1
            assert len(chunk.token_ids) == 1, "a dead row's token is known"
            return None
        assert chunk.start == slot.num_tokens, f"sequence {seq.seq_id} goes on at {slot.num_tokens}"
        if chunk.follows_pending:
            assert not seq.params.has_penalties, "penalties need the tokens"
            assert slot.last_step == number - 1, "a pending token is that of the step before"
            token_ids = [slot.last_token]
        else:
            token_ids = chunk.token_ids
        assert len(token_ids) == chunk.num_tokens
        slot.digest = zlib.crc32(bytes(token_ids), slot.digest)
        slot.num_tokens += chunk.num_tokens
        if not chunk.samples:
            return None
        index = len(seq.output_token_ids) + seq.num_pending_tokens
        bits = zlib.crc32(repr((slot.digest, seq.params.seed, index)).encode())
        is_end = bits % self._eos_one_in == 0
        slot.last_token = EOS if is_end else 1 + (bits >> 16) % 90
        slot.last_step = number
        if number in self.fails_in_result:
            slot.last_token = GARBAGE
        return StepOutput(seq.seq_id, [slot.last_token])
