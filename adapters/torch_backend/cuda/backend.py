"""The torch backend on a CUDA device: steps that overlap, decode steps as graphs, sampling on the device.

What enters are chunks, also such that follow a token of a step in flight; what leaves is a pending step. The
host sends one copy a step and waits for one. Everything particular to the device is behind `Machine`. Knows
no strategy, text or clock. Not verified on a GPU yet: its bookkeeping is tested on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base import BackendConfig, BackendError, ScheduledChunk, StepOutput
from adapters.torch_backend import loading
from adapters.torch_backend.backend import TOLERANCE, TorchBackend
from adapters.torch_backend.cuda import batch_invariance, flash_check, kv_memory
from adapters.torch_backend.cuda.graph_check import replay_error
from adapters.torch_backend.cuda.machine import CudaMachine, Machine
from adapters.torch_backend.cuda.packing import DevicePacker
from adapters.torch_backend.cuda.sampling import (
    NUM_FLOATS,
    NUM_INTS,
    RowSettings,
    needs_sampling,
    row_settings,
    sample_rows,
)
from adapters.torch_backend.cuda.step_buffers import BufferPool, StepBuffer
from adapters.torch_backend.cuda.step_graphs import DecodeGraphs, graph_sizes
from adapters.torch_backend.model.attention import BLOCK
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.model.linear import tile_rows
from adapters.torch_backend.packing import RowPlan

logger = logging.getLogger(__name__)

_PROBE_LEN = 128  # room for the self-test
_ADVICE = "lower MAX_BATCH, MAX_MODEL_LEN, MAX_STEP_TOKENS or KV_MEMORY_FRACTION"


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


class CudaTorchBackend(TorchBackend):
    """An `OverlappingBackend`."""

    _packer: DevicePacker
    _joins_products = True
    _keeps_bits = False
    _slack = 2.0  # a GPU's kernels round in other places; by how much was not measured
    _attempts = ((True, True), (False, True), (False, False))

    def __init__(self, config: BackendConfig, machine: Machine | None = None) -> None:
        """As `TorchBackend`; sizes the slots by free memory and captures graphs."""
        self._machine = machine or CudaMachine(loading.pick_device(config.device))
        self._buffers = BufferPool(self._machine)
        self._graphs: DecodeGraphs | None = None
        try:
            super().__init__(config)
        except torch.OutOfMemoryError as error:
            raise BackendError(f"out of memory while loading {config.model}: {_ADVICE}") from error

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        return self.launch(chunks).result()

    def launch(self, chunks: Seq[ScheduledChunk]) -> LaunchedStep:
        """Start a step: one copy to the device, the pass, one copy back; waits for nothing."""
        self._machine.make_current()
        plan = self._packer.plan(chunks)
        buffer = self._buffers.take()
        graphs, num_rows = self._graphs, len(plan.ids)
        size = graphs.size_for(num_rows) if graphs and plan.num_decodes == num_rows else None
        try:
            with torch.inference_mode():
                if graphs and size:
                    tokens, rows = self._replay(graphs, size, plan, buffer), plan.logit_rows
                else:
                    tokens, rows = self._compute(plan, buffer), list(range(len(plan.sampled)))
                buffer.download(tokens)
        except torch.OutOfMemoryError as error:
            raise BackendError(f"out of memory in a step of {num_rows} rows: {_ADVICE}") from error
        except torch.AcceleratorError:
            raise  # no later step could succeed: whoever started the engine has to start a new one
        except RuntimeError as error:
            raise BackendError(f"the forward pass failed: {error}") from error
        return LaunchedStep(buffer, self._buffers, len(tokens), [s.seq_id for s in plan.sampled], rows)

    def close(self) -> None:
        self._graphs = None
        super().close()

    def _compute(self, plan: RowPlan, buffer: StepBuffer) -> Tensor:
        """Any step, operator by operator; returns a token for each of `plan.sampled`."""
        num_sampled = len(plan.sampled)
        ints, floats, penalties = self._sampling(plan, range(num_sampled))
        step, views = self._packer.upload(plan, buffer, ints, floats)
        logits = self._forward(step.input_ids, step.layout, step.logit_rows)[:num_sampled]
        tokens = logits.argmax(-1)
        table, last = self._packer.table, step.logit_rows[:num_sampled]
        if views:
            settings = RowSettings(*views)
            drawn = sample_rows(logits, settings, table.ids, penalties=penalties)
            tokens.index_copy_(0, settings.row, drawn)
        table.put(step.layout.slots[last], step.layout.positions[last] + 1, tokens)
        return tokens

    def _replay(self, graphs: DecodeGraphs, size: int, plan: RowPlan, buffer: StepBuffer) -> Tensor:
        """A step of decode rows alone; returns a token for each row."""
        ints, floats, penalties = self._sampling(plan, plan.logit_rows)
        rows = graphs.padded(size, plan.ids, plan.slots, plan.positions)
        views = buffer.upload([*rows, *ints], floats, into=graphs.words)[len(rows) :]
        graphs.replay(size)
        if views:
            assert graphs.logits is not None
            settings, table = RowSettings(*views), self._packer.table
            drawn = sample_rows(graphs.logits, settings, table.ids, penalties=penalties)
            graphs.tokens.index_copy_(0, settings.row, drawn)
            table.put(settings.slot, settings.num_tokens, drawn)
        return graphs.tokens[: len(plan.ids)]

    def _decode_rows(self, ids: Tensor, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What a graph holds: no number of it is read back, and the likeliest tokens are noted."""
        table = self._packer.table
        layout = self._packer.decode_layout(slots, positions)
        every_row = torch.arange(len(ids), device=ids.device)
        logits = self._forward(table.complete(ids, slots, positions), layout, every_row)
        tokens = logits.argmax(-1)
        table.put(slots, positions + 1, tokens)
        return tokens, logits

    @staticmethod
    def _sampling(plan: RowPlan, rows: Seq[int]) -> tuple[list[list[int]], list[list[float]], bool]:
        """The settings of the rows that are not plainly greedy; `rows`: where the logits of `sampled` are."""
        chosen = [i for i, seq in enumerate(plan.sampled) if needs_sampling(seq)]
        if not chosen:
            return [], [], False
        sequences = [plan.sampled[i] for i in chosen]
        slots = [plan.slots[plan.logit_rows[i]] for i in chosen]
        ints, floats = row_settings([rows[i] for i in chosen], slots, sequences)
        return ints, floats, any(seq.params.has_penalties for seq in sequences)

    # What `TorchBackend` asks while it loads.

    def _make_packer(self, max_len: int) -> DevicePacker:
        """Over a cache that is just large enough for the self-test: its layers tell what a place takes."""
        return DevicePacker(self._machine, SlotCache(1, _PROBE_LEN), max_len, BLOCK)

    def _needs_tiles(self) -> bool:
        return self._options.batch_invariant

    def _tune(self, loaded: loading.LoadedModel, dtype: torch.dtype, *, flash: bool) -> None:
        packer, text = self._packer, loaded.config.get_text_config()
        if self._options.batch_invariant:
            tile_rows(loaded.module, batch_invariance.TILE_ROWS)
            packer.rows, packer.least_rows = batch_invariance.TILES, 2
        op = self._machine.attention if flash else None
        if op is not None:
            window = getattr(text, "sliding_window", None) or 0
            shape = loading.head_shape(text)
            op = flash_check.usable_attention(op, *shape, dtype, self._machine.device, window)
        packer.attention = op

    def _make_ready(self, loaded: loading.LoadedModel, max_len: int) -> int:
        """Slots as long as memory allows, graphs over them."""
        config, packer = self._config, self._packer
        wanted, free_bytes = max_len, self._machine.free_bytes()
        max_len = kv_memory.fitted_len(
            free_bytes=free_bytes,
            fraction=config.kv_memory_fraction,
            bytes_per_place=packer.cache.bytes_per_place,
            max_batch=config.max_batch_size,
            wanted=wanted,
            is_given=config.max_model_len is not None,
        )
        if max_len < wanted:
            logger.warning(
                "MAX_MODEL_LEN is %d, not %d: so much fits for MAX_BATCH=%d into KV_MEMORY_FRACTION=%g of "
                "%.1f GiB free", max_len, wanted, config.max_batch_size, config.kv_memory_fraction,
                free_bytes / (1 << 30),
            )  # fmt: skip
        packer.use(packer.cache.resized(config.max_batch_size, kv_memory.padded_len(max_len)), max_len)
        if self._options.batch_invariant:
            self._check_rows(loaded)
        if self._options.cuda_graphs:
            self._capture(loaded)
        return max_len

    def _check_rows(self, loaded: loading.LoadedModel) -> None:
        """Say loudly what breaks the promise of BATCH_INVARIANT, if anything does."""
        packer, text, device = self._packer, loaded.config.get_text_config(), self._machine.device
        changed = batch_invariance.changed_linears(loaded.module, device)
        shape, dtype = loading.head_shape(text), getattr(torch, self._dtype_name)
        op = packer.attention
        if op is not None and not flash_check.attention_keeps_bits(op, *shape, dtype, device):
            changed.append("attention")
        if batch_invariance.forward_is_changed(loaded.forward, packer, loaded.config.vocab_size):
            changed.append("the forward pass as a whole")
        self._keeps_bits = not changed
        if changed:
            logger.warning(
                "BATCH_INVARIANT does NOT hold here: the batch changes a row's bits in %s", "; ".join(changed)
            )

    def _capture(self, loaded: loading.LoadedModel) -> None:
        packer, config = self._packer, self._config
        if packer.attention is None:
            logger.warning("no CUDA graphs: the general attention path cannot be captured")
            return
        multiple = batch_invariance.TILE_ROWS if self._options.batch_invariant else 1
        graphs = DecodeGraphs(
            self._machine,
            self._decode_rows,
            graph_sizes(config.max_batch_size, multiple),
            packer.cache.scratch_slot,
            NUM_INTS + NUM_FLOATS,
        )
        try:
            graphs.capture()
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"out of memory while capturing CUDA graphs: {_ADVICE}, or set CUDA_GRAPHS=0"
            ) from error
        except BackendError:
            raise
        except Exception as error:  # whatever the model's code does in a capture
            self._machine.wait()
            logger.warning("NO CUDA graphs, decode steps run operator by operator: %s", error, exc_info=error)
            return
        off_by = replay_error(graphs, packer, loaded.forward, loaded.config.vocab_size)
        if off_by > (0.0 if self._keeps_bits else self._slack * TOLERANCE[getattr(torch, self._dtype_name)]):
            logger.warning(
                "NO CUDA graphs: a row out of one is off by %.1e from the same row without", off_by
            )
            return
        self._graphs = graphs

    def _more_details(self) -> dict[str, str | int | float | bool]:
        return {
            "attention": "general" if self._packer.attention is None else "flash",
            "cuda_graphs": len(self._graphs.sizes) if self._graphs else 0,
            "batch_invariant": self._keeps_bits,
            "same_bits_rows": self._packer.rows.described() if self._keeps_bits else "not measured",
            "attention_padding": "not measured",
        }
