"""The vLLM backend: the lab decides who has a row in a step, vLLM how prompts are cut and computed.

Two things differ from a backend that computes what it is told, and `info.details` names them. vLLM cuts
prompts by its own budget, which is MAX_STEP_TOKENS too. A dead row goes on answering, so its context grows by
one token a step.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence as Seq
from typing import Any

from adapters.base import (
    BackendConfig,
    BackendError,
    BackendInfo,
    ConfigError,
    ScheduledChunk,
    StepOutput,
)
from adapters.chunks import check_chunks
from adapters.cores import default_threads
from adapters.description import HF_FORMATS
from adapters.models.safetensors_file import count_parameters
from adapters.models.store import pick_model_len, resolve_model, trained_positions
from adapters.text.tokenizer import HFTokenizer
from adapters.vllm_backend import VllmOptions

logger = logging.getLogger(__name__)

_BLOCK_TOKENS = 32
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DTYPES = {"auto": "auto", **{alias: _NAMES[name] for alias, name in HF_FORMATS.items()}}
_SHORT_NAMES = {long: short for short, long in _NAMES.items()}


class VllmBackend:
    """A `Backend` for Hugging Face folders."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model and its cache.

        Raises:
            ConfigError, BackendError: with what to change.
        """
        files = resolve_model(config)
        options = config.options_as(VllmOptions)
        dtype = files.format or config.dtype
        if dtype not in _DTYPES:
            raise ConfigError(f"DTYPE={dtype}: BACKEND=vllm computes in fp32, bf16 or fp16")
        model = json.loads((files.folder / "config.json").read_text("utf-8"))
        max_model_len = pick_model_len(config, trained_positions(model, config.model), config.model)
        num_slots = config.max_batch_size
        cache_tokens = options.vllm_cache_tokens or num_slots * max_model_len
        if cache_tokens < max_model_len:
            raise ConfigError(
                f"VLLM_CACHE_TOKENS={cache_tokens} is less than one sequence of {max_model_len}"
            )
        num_threads = config.num_threads or default_threads()
        _set_environment(num_threads)
        import vllm  # it reads the environment as it is imported
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from adapters.vllm_backend.requests import Requests
        from adapters.vllm_backend.scheduler import StepScheduler

        device: str = current_platform.device_type
        if config.device.partition(":")[0] not in ("auto", device):
            raise ConfigError(f"DEVICE={config.device}: this vLLM computes on {device}")
        # Each slot may leave a part of its last block empty; one block is vLLM's own.
        num_blocks = -(-cache_tokens // _BLOCK_TOKENS) + num_slots + 1
        budget = options.vllm_max_num_batched_tokens or config.max_step_tokens
        arguments = vllm.EngineArgs(
            model=str(files.folder),
            dtype=_DTYPES[dtype],
            max_model_len=max_model_len + 1,  # it counts the last token, which is never computed
            max_num_seqs=num_slots,
            max_num_batched_tokens=max(budget, num_slots),
            enable_chunked_prefill=True,
            enable_prefix_caching=options.vllm_prefix_caching,
            enforce_eager=options.vllm_enforce_eager,
            block_size=_BLOCK_TOKENS,
            num_gpu_blocks_override=num_blocks,
            kv_cache_memory_bytes=num_blocks * _BLOCK_TOKENS * _max_bytes_per_token(model),
            skip_tokenizer_init=True,
            generation_config="vllm",  # none of the model's own
            disable_log_stats=True,
            async_scheduling=False,
            scheduler_cls=StepScheduler,
        )
        try:
            self._engine: Any = LLMEngine.from_engine_args(arguments)
        except Exception as error:  # its errors have no common base
            raise BackendError(f"vLLM cannot load {files.folder}: {_first_line(error)}") from error
        self._scheduler: StepScheduler = self._engine.engine_core.engine_core.scheduler
        self._requests = Requests(self._engine, self._scheduler, max_model_len)
        self._slots: dict[int, int] = {}
        """Tokens of each sequence that the lab counts as computed."""
        made = self._engine.vllm_config
        computed_in = str(made.model_config.dtype).removeprefix("torch.")
        self._info = BackendInfo(
            backend="vllm",
            model=files.name,
            device=device,
            dtype=_SHORT_NAMES.get(computed_in, computed_in),
            vocab_size=model["vocab_size"],
            eos_token_ids=HFTokenizer.from_folder(files.folder).eos_token_ids,
            max_batch_size=num_slots,
            max_model_len=max_model_len,
            kv_capacity_tokens=min(cache_tokens, num_slots * max_model_len),
            num_parameters=count_parameters(files.folder),
            model_digest=files.digest,
            num_threads=num_threads,
            details={
                "vllm": vllm.__version__,
                "num_kv_blocks": num_blocks,
                "max_num_batched_tokens": made.scheduler_config.max_num_batched_tokens,
                "prefix_caching": options.vllm_prefix_caching,
                "enforce_eager": options.vllm_enforce_eager,
                "prompt_chunks": "cut by vLLM's own budget of a step",
                "dead_rows": "answer on",
                "sampling": "vLLM's own generator and penalties",
            },
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        """Steps vLLM as often as it takes until `chunks` are computed.

        Raises:
            BackendError: a chunk does not continue what its slot holds, or vLLM failed.
            CapacityError: more sequences than slots, or a sequence longer than a slot.
        """
        check_chunks(chunks, self._slots, self._info.max_batch_size, self._info.max_model_len)
        num_preempted = self._scheduler.num_preempted
        tokens = self._requests.compute(chunks)
        if self._scheduler.num_preempted > num_preempted:
            logger.warning("vLLM preempted sequences, %d until now", self._scheduler.num_preempted)
        for chunk in chunks:
            self._slots[chunk.seq.seq_id] = chunk.start + chunk.num_tokens
        return [StepOutput(seq_id, [token]) for seq_id, token in tokens.items()]

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self._slots.pop(seq_id, None)
            self._requests.cancel(seq_id)

    def close(self) -> None:
        if self._engine is not None:
            share = 100 * self._scheduler.peak_kv_usage
            num_preempted = self._scheduler.num_preempted
            logger.info("vLLM used up to %.0f%% of its KV blocks, preempted %d times", share, num_preempted)
            self._engine.engine_core.shutdown()
            self._engine = None


def _set_environment(num_threads: int) -> None:
    """What vLLM takes from the environment alone; what the user set there stays, but for the threads."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # for the one token more
    for name, value in {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)


def _max_bytes_per_token(model: dict[str, Any]) -> int:
    """Keys and values of one position in fp32, which is more than in any other format."""
    num_heads: int = model["num_attention_heads"]
    width = model.get("head_dim") or model["hidden_size"] // num_heads
    return 2 * 4 * int(model["num_hidden_layers"] * model.get("num_key_value_heads", num_heads) * width)


def _first_line(error: Exception) -> str:
    """vLLM's errors of validation have a line of their own for each field."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__
