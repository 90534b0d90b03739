"""Steps that are launched and read later: one copy to the device, the pass, one copy back.

The host never waits while it launches, so a step may follow tokens that no one has read yet: their ids stay
on the device, in the packer's table. Steps replay a graph where there is one of their size.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base import BackendError, Sequence, StepOutput
from adapters.torch_backend.cuda.machine import Machine
from adapters.torch_backend.cuda.packing import DevicePacker
from adapters.torch_backend.cuda.sampling import (
    RowGroup,
    RowSettings,
    needs_sampling,
    row_settings,
    sample_rows,
)
from adapters.torch_backend.cuda.step_buffers import BufferPool, StepBuffer
from adapters.torch_backend.cuda.step_graphs import CapturedSteps
from adapters.torch_backend.loading import Forward
from adapters.torch_backend.packing import RowPlan

ADVICE = "lower MAX_BATCH, MAX_MODEL_LEN, MAX_STEP_TOKENS or KV_MEMORY_FRACTION"


@dataclass(slots=True)
class LaunchedStep:
    """A `PendingStep`: rows of the tokens that are on their way, and whose they are."""

    buffer: StepBuffer
    pool: BufferPool
    num_tokens: int
    seq_ids: list[int]
    rows: Seq[int]

    def result(self) -> list[StepOutput]:
        try:
            tokens = self.buffer.received(self.num_tokens)
        except torch.AcceleratorError:
            raise  # as in `launch`
        except RuntimeError as error:
            raise BackendError(f"the step failed on the device: {error}") from error
        self.pool.give_back(self.buffer)
        return [StepOutput(seq_id, [tokens[r]]) for seq_id, r in zip(self.seq_ids, self.rows, strict=True)]


class StepLauncher:
    """`graphs` serve steps in which every row decodes; what has no size among its graphs runs operator by
    operator."""

    def __init__(
        self,
        machine: Machine,
        packer: DevicePacker,
        forward: Forward,
        graphs: CapturedSteps | None,
        mixed_graphs: CapturedSteps | None = None,
    ) -> None:
        self.forward = forward
        self._machine = machine
        self._packer = packer
        self._graphs = graphs
        self._mixed_graphs = mixed_graphs
        self._buffers = BufferPool(machine)

    def launch(self, plan: RowPlan) -> LaunchedStep:
        """Raises: BackendError where the step cannot be started; AcceleratorError where none could be."""
        self._machine.make_current()
        buffer = self._buffers.take()
        num_rows = len(plan.ids)
        graphs = self._graphs if plan.num_decodes == num_rows else self._mixed_graphs
        size = graphs.size_for(plan) if graphs else None
        try:
            with torch.inference_mode():
                if graphs and size:
                    rows = graphs.rows_of(plan)
                    tokens = self._replay(graphs, size, plan, rows, buffer)
                else:
                    rows = range(len(plan.sampled))
                    tokens = self._compute(plan, buffer)
                buffer.download(tokens)
        except torch.OutOfMemoryError as error:
            raise BackendError(f"out of memory in a step of {num_rows} rows: {ADVICE}") from error
        except torch.AcceleratorError:
            raise  # no later step could succeed: whoever started the engine has to start a new one
        except RuntimeError as error:
            raise BackendError(f"the forward pass failed: {error}") from error
        return LaunchedStep(buffer, self._buffers, len(tokens), [s.seq_id for s in plan.sampled], rows)

    def _compute(self, plan: RowPlan, buffer: StepBuffer) -> Tensor:
        """Any step, operator by operator; returns a token for each of `plan.sampled`."""
        num_sampled = len(plan.sampled)
        ints, floats, groups = _sampling(plan, range(num_sampled))
        step, views = self._packer.upload(plan, buffer, ints, floats)
        logits = self.forward(step.input_ids, step.layout, step.logit_rows)[:num_sampled]
        self._ban(logits, range(num_sampled), plan.sampled)
        tokens = logits.argmax(-1)
        table, last = self._packer.table, step.logit_rows[:num_sampled]
        if views:
            settings = RowSettings(*views)
            drawn = sample_rows(logits, settings, groups, table.ids)
            tokens.index_copy_(0, settings.row, drawn)
        table.put(step.layout.slots[last], step.layout.positions[last] + 1, tokens)
        return tokens

    def _replay(
        self,
        graphs: CapturedSteps,
        size: int,
        plan: RowPlan,
        rows: Seq[int],
        buffer: StepBuffer,
    ) -> Tensor:
        """A step out of a graph; returns tokens, of which `rows` are those of `plan.sampled`."""
        ints, floats, groups = _sampling(plan, rows)
        words = graphs.padded(size, plan)
        views = buffer.upload([*words, *ints], floats, into=graphs.words)[len(words) :]
        graphs.replay(size)
        if views:
            # The graph has noted the likeliest tokens in the table; what was drawn replaces them.
            assert graphs.logits is not None
            self._ban(graphs.logits, rows, plan.sampled)
            settings, table = RowSettings(*views), self._packer.table
            drawn = sample_rows(graphs.logits, settings, groups, table.ids)
            graphs.tokens.index_copy_(0, settings.row, drawn)
            table.put(settings.slot, settings.num_tokens, drawn)
        return graphs.tokens[: max(rows, default=-1) + 1]

    def _ban(self, logits: Tensor, rows: Seq[int], sequences: Seq[Sequence]) -> None:
        """Rule out what `min_tokens` does in this step; `rows`: where the logits of `sequences` are."""
        banned = [
            (row, token_id)
            for row, seq in zip(rows, sequences, strict=True)
            if seq.params.min_tokens
            for token_id in seq.params.banned_at(seq.num_tokens - seq.num_prompt_tokens)
        ]
        if banned:
            # From other memory than pinned, the host would wait for the step before. torch lends this piece
            # of it again only once the copy is done.
            words = self._machine.pinned(2 * len(banned)).copy_(torch.tensor(banned).T.flatten())
            at, ids = words.to(logits.device, non_blocking=True).view(2, -1)
            logits[at, ids] = -torch.inf


def decode_rows(
    packer: DevicePacker, forward: Forward, ids: Tensor, slots: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """What a graph holds: no number of it is read back, and the likeliest tokens are noted."""
    table = packer.table
    layout = packer.decode_layout(slots, positions)
    every_row = torch.arange(len(ids), device=ids.device)
    logits = forward(table.complete(ids, slots, positions), layout, every_row)
    tokens = logits.argmax(-1)
    table.put(slots, positions + 1, tokens)
    return tokens, logits


def _sampling(plan: RowPlan, rows: Seq[int]) -> tuple[list[list[int]], list[list[float]], list[RowGroup]]:
    """The settings of the rows that are not plainly greedy; `rows`: where the logits of `sampled` are."""
    chosen = [i for i, seq in enumerate(plan.sampled) if needs_sampling(seq)]
    if not chosen:
        return [], [], []
    slots = [plan.slots[plan.logit_rows[i]] for i in chosen]
    return row_settings([rows[i] for i in chosen], slots, [plan.sampled[i] for i in chosen])
