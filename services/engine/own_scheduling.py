"""The loop around an engine that schedules itself (SCHEDULING=engine): it hands sequences over as they come,
steps the engine, and tells what each step was.

No strategy, order, layout or KV policy of the lab has a say. Step records are made from what the engine says
that it computed. `batch_wait_s` is 0, since nothing is known of why a sequence waited, and so are dead rows:
a row of a sequence that has ended meanwhile is not told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from adapters.base import (
    BackendError,
    OwnStep,
    RequestTooLong,
    ScheduledChunk,
    SchedulingEngine,
    Sequence,
    SequenceState,
)
from services.contract.timings import StepRecord
from services.engine.finish import append_tokens, finish
from services.engine.limits import SchedulerLimits
from services.engine.message_loop import Inbox, run_loop
from services.engine.messages import Cancel, Drain, SequenceUpdate, StepReport, Submit
from services.engine.step_plan import contexts

_NOTHING_COMPUTED_S = 0.001
"""How long to wait where the engine has work and computed nothing: a result of its device is still to come.
vLLM's own loop waits as long, but not after a step that it has launched and that gave no result yet, which
only engines that plan ahead (on GPUs) have."""


class OwnSchedulingLoop:
    """An `EngineLoop`. All methods but `busy_s` are called from one thread, and so is `publish`."""

    def __init__(
        self,
        engine: SchedulingEngine,
        limits: SchedulerLimits,
        publish: Callable[[StepReport], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._publish = publish
        self._clock = clock
        self._eos_token_ids = frozenset(engine.info.eos_token_ids)
        self._sequences: dict[int, Sequence] = {}
        """Those that the engine still has."""
        self._kv_used_tokens = 0
        """After the last step."""
        self._num_steps = 0
        self._publish_s = 0.0  # of the step before
        self._began_s: float | None = None

    def run(self, inbox: Inbox) -> None:
        run_loop(inbox, self.handle, self.step)

    def busy_s(self) -> float:
        began_s = self._began_s
        return 0.0 if began_s is None else self._clock() - began_s

    def handle(self, messages: Iterable[Submit | Cancel | Drain]) -> None:
        """Act on messages, in their order; what ends by them is published without a record."""
        updates: list[SequenceUpdate] = []
        self._began_s = self._clock()
        for message in messages:
            match message:
                case Submit(sequences):
                    updates += self._add(sequences)
                case Cancel(seq_ids, reason):
                    ended = [seq for i in seq_ids if (seq := self._sequences.pop(i, None))]
                    self._engine.release([seq.seq_id for seq in ended])
                    updates += [finish(seq, [], reason, self._clock()) for seq in ended]
                case Drain():
                    pass  # nothing is held back
        self._began_s = None
        if updates:
            num_running = sum(seq.state is SequenceState.RUNNING for seq in self._sequences.values())
            self._report(updates, None, num_running, len(self._sequences) - num_running)

    def step(self) -> float | None:
        """One step of the engine, if it has work; returns what `run_loop` asks for."""
        if not self._engine.has_work:
            return None
        start_s = self._began_s = self._clock()
        made = self._engine.step()
        done_s = self._clock()
        self._note_computed(made, start_s)
        updates = self._updates(made, done_s)
        record = self._record(made, start_s, done_s) if made.chunks else None
        self._note_preempted(made)
        self._kv_used_tokens = made.kv_used_tokens
        self._began_s = None
        if record is None and not updates:
            return _NOTHING_COMPUTED_S
        began_s = self._clock()
        self._report(updates, record, made.num_running, made.queue_depth)
        self._publish_s = self._clock() - began_s
        return 0.0

    def _report(
        self, updates: list[SequenceUpdate], record: StepRecord | None, num_running: int, queue_depth: int
    ) -> None:
        prefilling = [
            seq.seq_id
            for seq in self._sequences.values()
            if seq.state is SequenceState.RUNNING and seq.first_token_s is None
        ]
        used = self._kv_used_tokens if self._sequences else 0
        self._publish(StepReport(updates, record, num_running, queue_depth, used, prefilling))

    def _add(self, sequences: Seq[Sequence]) -> list[SequenceUpdate]:
        try:
            self._limits.check(sequences)
            for seq in sequences:
                self._engine.add(seq)
        except (RequestTooLong, BackendError) as error:
            self._engine.release([seq.seq_id for seq in sequences])
            return [SequenceUpdate(seq.seq_id, [], "error", error=str(error)) for seq in sequences]
        self._sequences.update((seq.seq_id, seq) for seq in sequences)
        return []

    def _note_computed(self, made: OwnStep, start_s: float) -> None:
        num_rows = len(made.chunks)
        for chunk in made.chunks:
            seq = chunk.seq
            if seq.admitted_s is None:
                seq.admitted_s = start_s
                seq.num_cached_tokens = chunk.start
            if seq.state is SequenceState.WAITING:
                seq.state = SequenceState.RUNNING
            seq.num_steps += 1
            seq.sum_batch_rows += num_rows

    def _note_preempted(self, made: OwnStep) -> None:
        """Last: where an engine plans a step ahead, one that it preempts still had a row in this step."""
        for seq_id in made.preempted_seq_ids:
            if seq := self._sequences.get(seq_id):
                seq.state = SequenceState.WAITING
                seq.num_prefill_tokens = seq.num_tokens

    def _updates(self, made: OwnStep, done_s: float) -> list[SequenceUpdate]:
        updates: list[SequenceUpdate] = []
        for output in made.outputs:
            seq = self._sequences.get(output.seq_id)
            if seq is None:
                continue
            if output.token_ids and seq.first_token_s is None:
                seq.first_token_s = done_s
            num_before = len(seq.output_token_ids)
            reason = append_tokens(seq, output.token_ids, self._eos_token_ids)
            if reason is None:
                updates.append(SequenceUpdate(seq.seq_id, output.token_ids))
            else:
                updates.append(finish(seq, seq.output_token_ids[num_before:], reason, done_s))
        for seq_id in made.ended_seq_ids:
            seq = self._sequences.get(seq_id)
            if seq is not None and seq.finish_reason is None:
                updates.append(finish(seq, [], "error", done_s, "the engine ended this sequence too early"))
        ended = [update.seq_id for update in updates if update.finish_reason is not None]
        for seq_id in ended:
            del self._sequences[seq_id]
        self._engine.release(ended)
        return updates

    def _record(self, made: OwnStep, start_s: float, done_s: float) -> StepRecord:
        decoding = [chunk for chunk in made.chunks if chunk.is_decode]
        record = StepRecord(
            step=self._num_steps,
            start_s=start_s,
            duration_s=done_s - start_s,
            num_rows=len(made.chunks),
            num_prompt_tokens=_num_tokens(made.chunks) - _num_tokens(decoding),
            num_decode_tokens=len(decoding),
            num_dead_rows=0,
            queue_depth=made.queue_depth,
            **contexts(made.chunks),
            num_preempted=len(made.preempted_seq_ids),
            publish_s=self._publish_s,
        )
        self._num_steps += 1
        return record


def _num_tokens(chunks: Iterable[ScheduledChunk]) -> int:
    return sum(chunk.num_tokens for chunk in chunks)
