"""What the start of a model does on CUDA: flash attention if it is right, slots by free memory, graphs.

Each fast part is measured against the plain one on the device itself. A part that fails is dropped with a
warning, and the model serves without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from adapters.base import BackendConfig, BackendError
from adapters.torch_backend import TorchOptions, loading
from adapters.torch_backend.cuda import batch_invariance, flash_check, kv_memory
from adapters.torch_backend.cuda.fused import usable_decode_attention, usable_ops
from adapters.torch_backend.cuda.graph_check import mixed_replay_error, replay_error
from adapters.torch_backend.cuda.machine import Machine
from adapters.torch_backend.cuda.mixed_graphs import MixedGraphs
from adapters.torch_backend.cuda.packing import DevicePacker
from adapters.torch_backend.cuda.sampling import NUM_FLOATS, NUM_INTS, working_bytes
from adapters.torch_backend.cuda.step_graphs import CapturedSteps, DecodeGraphs, graph_sizes
from adapters.torch_backend.cuda.steps import ADVICE, decode_rows
from adapters.torch_backend.loading import Forward, LoadedModel
from adapters.torch_backend.model.attention import BLOCK
from adapters.torch_backend.model.kv_cache import SlotCache
from adapters.torch_backend.model.linear import tile_rows
from adapters.torch_backend.model.llama_forward import FusedOps
from adapters.torch_backend.model.llama_shape import llama_shape
from adapters.torch_backend.startup import TOLERANCE, Attempt, Details

logger = logging.getLogger(__name__)

GraphsT = TypeVar("GraphsT", bound=CapturedSteps)

_PROBE_LEN = 128  # room for the self-test


class CudaSetup:
    """A `DeviceSetup`; `packer` and the graphs are its result beside the model."""

    attempts: tuple[Attempt, ...] = (
        Attempt(fast=True, flash=True),
        Attempt(fast=False, flash=True),
        Attempt(fast=False),
    )
    slack = 2.0  # a GPU's kernels round elsewhere
    joined = True
    packer: DevicePacker

    def __init__(self, config: BackendConfig, machine: Machine) -> None:
        self.device = machine.device
        self._options = config.options_as(TorchOptions)
        self.tiled = self._options.batch_invariant
        self.graphs: DecodeGraphs | None = None
        self.mixed_graphs: MixedGraphs | None = None
        self._config = config
        self._machine = machine
        self._keeps_bits = False
        self._ops = machine.fused_ops() if self._options.triton_kernels else None

    def make_packer(self, max_len: int, dtype: torch.dtype, num_threads: int) -> DevicePacker:
        """Over a cache that is just large enough for the self-test: its layers tell what a position takes."""
        self.packer = DevicePacker(self._machine, SlotCache(1, _PROBE_LEN), max_len, BLOCK)
        return self.packer

    def fused(self, loaded: LoadedModel) -> FusedOps | None:
        """Raises: AcceleratorError where the device is lost."""
        shape = llama_shape(loaded.config)
        return usable_ops(self._ops, shape, loaded.dtype, self.device) if shape else None

    def tune(self, loaded: LoadedModel, *, flash: bool) -> None:
        packer, text = self.packer, loaded.config.get_text_config()
        if self._options.batch_invariant:
            tile_rows(loaded.module, batch_invariance.TILE_ROWS)
            packer.rows, packer.least_rows = batch_invariance.TILES, 2
        packer.attention = packer.decode_attention = None
        if not flash:
            return
        window = getattr(text, "sliding_window", None) or 0
        shape, op = loading.head_shape(text), self._machine.attention
        if op is not None:
            packer.attention = flash_check.usable_attention(op, *shape, loaded.dtype, self.device, window)
        packer.decode_attention = usable_decode_attention(self._ops, shape, loaded.dtype, self.device, window)

    def make_ready(self, loaded: LoadedModel, max_len: int) -> int:
        """Slots as long as memory allows, graphs over them."""
        config, packer = self._config, self.packer
        wanted, free_bytes = max_len, self._machine.free_bytes()
        max_len = kv_memory.fitted_len(
            free_bytes=free_bytes,
            fraction=config.kv_memory_fraction,
            bytes_per_position=packer.cache.bytes_per_position,
            max_batch=config.max_batch_size,
            wanted=wanted,
            is_given=config.max_model_len is not None,
            reserve_bytes=working_bytes(config.max_batch_size, loaded.config.vocab_size),
        )
        if max_len < wanted:
            logger.warning(
                "MAX_MODEL_LEN is %d, not %d: so much fits for MAX_BATCH=%d into KV_MEMORY_FRACTION=%g of "
                "%.1f GiB free", max_len, wanted, config.max_batch_size, config.kv_memory_fraction,
                free_bytes / (1 << 30),
            )  # fmt: skip
        packer.use(packer.cache.resized(config.max_batch_size, kv_memory.padded_len(max_len)), max_len)
        if self._options.batch_invariant:
            self.check_rows(loaded)
        if self._options.cuda_graphs:
            self._capture(loaded)
        return max_len

    def check_rows(self, loaded: LoadedModel) -> None:
        """Say loudly what breaks the promise of BATCH_INVARIANT, if anything does."""
        packer, text = self.packer, loaded.config.get_text_config()
        changed = batch_invariance.changed_linears(loaded.module, self.device)
        shape, op = loading.head_shape(text), packer.attention
        if op is not None and not flash_check.attention_keeps_bits(op, *shape, loaded.dtype, self.device):
            changed.append("attention")
        if batch_invariance.forward_is_changed(loaded.forward, packer, loaded.config.vocab_size):
            changed.append("the forward pass as a whole")
        self._keeps_bits = not changed
        if changed:
            logger.warning(
                "BATCH_INVARIANT does NOT hold here: the batch changes a row's bits in %s", "; ".join(changed)
            )

    def _capture(self, loaded: LoadedModel) -> None:
        packer, config = self.packer, self._config
        decodes = packer.decode_attention
        if packer.attention is None and decodes is None:
            logger.warning("no CUDA graphs: the general attention path cannot be captured")
            return
        multiple = batch_invariance.TILE_ROWS if self._options.batch_invariant else 1
        num_words = NUM_INTS + NUM_FLOATS
        if packer.attention is not None and decodes is not None:
            mixed = MixedGraphs(
                self._machine,
                packer,
                loaded.forward,
                decodes,
                max_batch=config.max_batch_size,
                max_rows=config.max_step_tokens,
                num_weights=loaded.num_parameters,
                num_extra_words=num_words,
            )
            self.mixed_graphs = self._captured(mixed, mixed_replay_error, loaded)
        graphs = DecodeGraphs(
            self._machine,
            partial(decode_rows, packer, loaded.forward),
            graph_sizes(config.max_batch_size, multiple),
            packer.cache.scratch_slot,
            num_words,
        )
        self.graphs = self._captured(graphs, replay_error, loaded)

    def _captured(
        self,
        graphs: GraphsT,
        replay_error: Callable[[GraphsT, DevicePacker, Forward, int], float],
        loaded: LoadedModel,
    ) -> GraphsT | None:
        """`graphs` if they can be captured and give what the same rows give without them."""
        try:
            graphs.capture()
        except torch.OutOfMemoryError as problem:
            raise BackendError(
                f"out of memory while capturing CUDA graphs: {ADVICE}, or set CUDA_GRAPHS=0"
            ) from problem
        except BackendError:
            raise
        except Exception as problem:  # whatever the model's code does in a capture
            self._machine.wait()
            logger.warning("NO CUDA graphs, steps run operator by operator: %s", problem, exc_info=problem)
            return None
        off_by = replay_error(graphs, self.packer, loaded.forward, loaded.config.vocab_size)
        if off_by > (0.0 if self._keeps_bits else self.slack * TOLERANCE[loaded.dtype]):
            logger.warning(
                "NO CUDA graphs: a row out of one is off by %.1e from the same row without", off_by
            )
            return None
        return graphs

    def details(self) -> Details:
        return {
            "attention": "general" if self.packer.attention is None else "flash",
            "decode_attention": "triton" if self.packer.decode_attention else "as the others",
            "cuda_graphs": len(self.graphs.sizes) if self.graphs else 0,
            "mixed_cuda_graphs": len(self.mixed_graphs.sizes) if self.mixed_graphs else 0,
            "batch_invariant": self._keeps_bits,
            "same_bits_rows": self.packer.rows.described() if self._keeps_bits else "not measured",
            "attention_padding": "not measured",
        }
