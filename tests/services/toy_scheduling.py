"""An engine with a scheduler of its own, simple enough to know what it does: two run, the rest waits.

A prompt is computed whole with its first token; each token of an answer is one more than the last one.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from adapters.base import (
    BackendConfig,
    BackendError,
    BackendInfo,
    OwnStep,
    ScheduledChunk,
    Sequence,
    StepOutput,
)
from adapters.description import BackendDescription
from adapters.text.tokenizer import ByteTokenizer

NUM_RUNNING = 2
EOS = 256
REFUSED = 13
"""A prompt that begins with it is refused."""
BREAKS = 14


class ToyScheduling:
    def __init__(self, config: BackendConfig) -> None:
        self.info = BackendInfo("toy", "toy", "cpu", "none", 257, (EOS,), NUM_RUNNING, 64, 128)
        self.running: list[tuple[Sequence, list[int]]] = []
        self.waiting: list[Sequence] = []
        self.released: list[int] = []
        self.preempts = False
        self.preempts_late = False
        """As an engine that plans the next step before it takes the results of this one."""
        self.ends_early = False

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        if seq.prompt_token_ids[0] == REFUSED:
            raise BackendError("the toy refuses it")
        self.waiting.append(seq)

    def step(self) -> OwnStep:
        preempted: list[int] = []
        if self.preempts and self.running:
            self.preempts = False
            seq, _ = self.running.pop()
            self.waiting.insert(0, seq)
            return OwnStep([], [], [], [seq.seq_id], len(self.running), len(self.waiting), 0)
        while self.waiting and len(self.running) < NUM_RUNNING:
            seq = self.waiting.pop(0)
            self.running.append((seq, list(seq.prompt_token_ids + seq.output_token_ids)))
        chunks, outputs, ended = [], [], []
        for seq, known in self.running:
            if known[0] == BREAKS:
                raise RuntimeError("the toy broke")
            start = seq.num_prompt_tokens + len(seq.output_token_ids) - 1 if seq.output_token_ids else 0
            chunks.append(ScheduledChunk(seq, start, len(known) - start))
            known.append(known[-1] + 1)
            outputs.append(StepOutput(seq.seq_id, [known[-1]]))
            num_outputs = len(known) - seq.num_prompt_tokens
            is_end = known[-1] in seq.params.stop_token_ids or known[-1] == EOS
            if num_outputs == seq.params.max_tokens or is_end or self.ends_early:
                ended.append(seq.seq_id)
        self.running = [(seq, known) for seq, known in self.running if seq.seq_id not in ended]
        if self.preempts_late and self.running:
            self.preempts_late = False
            seq, _ = self.running.pop()
            self.waiting.insert(0, seq)
            preempted.append(seq.seq_id)
        used = sum(len(known) for _, known in self.running)
        return OwnStep(chunks, outputs, ended, preempted, len(self.running), len(self.waiting), used)

    def release(self, seq_ids: Seq[int]) -> None:
        self.released += seq_ids
        self.running = [(seq, known) for seq, known in self.running if seq.seq_id not in seq_ids]
        self.waiting = [seq for seq in self.waiting if seq.seq_id not in seq_ids]

    def close(self) -> None: ...


def load_tokenizer(config: BackendConfig) -> ByteTokenizer:
    return ByteTokenizer()


DESCRIPTION = BackendDescription(
    make=f"{__name__}:ToyScheduling",
    make_scheduling=f"{__name__}:ToyScheduling",
    tokenizer=f"{__name__}:load_tokenizer",
)
