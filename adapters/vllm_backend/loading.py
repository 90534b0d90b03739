"""Loads a model into vLLM's `LLMEngine`, in this process: its settings, the errors, and what is loaded."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from adapters.base import BackendConfig, BackendError, BackendInfo, ConfigError
from adapters.cores import default_threads
from adapters.description import HF_FORMATS
from adapters.gpu import Gpu
from adapters.models.safetensors_file import count_parameters
from adapters.models.store import pick_model_len, resolve_model, trained_positions
from adapters.text.tokenizer import HFTokenizer
from adapters.vllm_backend import VllmOptions

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 32
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DTYPES = {"auto": "auto", **{alias: _NAMES[name] for alias, name in HF_FORMATS.items()}}
_SHORT_NAMES = {long: short for short, long in _NAMES.items()}


def load_llm_engine(config: BackendConfig, *, steps_as_told: bool) -> tuple[Any, BackendInfo]:
    """An `LLMEngine`, whose scheduler lets those compute that it is told to, or is vLLM's own.

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
        raise ConfigError(f"VLLM_CACHE_TOKENS={cache_tokens} is less than one sequence of {max_model_len}")
    num_threads = config.num_threads or default_threads()
    _set_environment(num_threads)
    import vllm  # it reads the environment as it is imported
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    if steps_as_told:
        from adapters.vllm_backend.scheduler import StepScheduler

        own = {"async_scheduling": False, "scheduler_cls": StepScheduler}
    else:
        own = {}  # as vLLM takes them

    device: str = current_platform.device_type
    if config.device.partition(":")[0] not in ("auto", device):
        raise ConfigError(f"DEVICE={config.device}: this vLLM computes on {device}")
    if device == "cpu" and config.device == "auto" and Gpu().read() is not None:
        logger.warning(
            "there is a GPU, but this vLLM is the build for CPUs: docs/engines.md says how to install the "
            "one for GPUs, and DEVICE=cpu that this one is meant"
        )
    # Each slot may leave a part of its last block empty; one block is vLLM's own.
    num_blocks = -(-cache_tokens // BLOCK_TOKENS) + num_slots + 1
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
        block_size=BLOCK_TOKENS,
        num_gpu_blocks_override=num_blocks,
        kv_cache_memory_bytes=num_blocks * BLOCK_TOKENS * _max_bytes_per_token(model),
        skip_tokenizer_init=True,
        generation_config="vllm",  # none of the model's own
        disable_log_stats=True,
        **own,
    )
    try:
        engine: Any = LLMEngine.from_engine_args(arguments)
    except Exception as error:  # its errors have no common base
        raise BackendError(f"vLLM cannot load {files.folder}: {_first_line(error)}") from error
    if device == "cpu":
        from adapters.vllm_backend.cpu_generators import take_back_draws

        take_back_draws(engine)
    made = engine.vllm_config
    computed_in = str(made.model_config.dtype).removeprefix("torch.")
    info = BackendInfo(
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
            **(
                {"dead_rows": "answer on"}
                if steps_as_told
                else {"scheduler": f"vLLM's {_scheduler_name(engine)}"}
            ),
            "sampling": "vLLM's own generator and penalties",
        },
    )
    return engine, info


def scheduler_of(engine: Any) -> Any:
    """vLLM's scheduler; it runs in this process."""
    return engine.engine_core.engine_core.scheduler


def _scheduler_name(engine: Any) -> str:
    return type(scheduler_of(engine)).__name__


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
