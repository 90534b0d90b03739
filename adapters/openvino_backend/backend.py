"""The OpenVINO backend: the lab decides who has a row in a step, OpenVINO's scheduler how it is computed.

Three things differ from a backend that computes what it is told, and `info.details` names them. A prompt is
kept until its last chunk and computed whole then. A sequence that is left out of a step is computed ahead. A
dead row goes on answering, so its context grows by one token a step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import openvino
import openvino_genai as genai

from adapters.base import (
    BackendConfig,
    BackendError,
    BackendInfo,
    ConfigError,
    EngineFigure,
    ScheduledChunk,
    StepOutput,
)
from adapters.chunks import check_chunks
from adapters.cores import default_threads
from adapters.models.gguf.store import gguf_made_from
from adapters.models.packaged import PACKAGED
from adapters.models.safetensors_file import count_parameters
from adapters.models.store import ModelFiles, pick_model_len, resolve_model, split_format, trained_positions
from adapters.openvino_backend import FORMATS, OpenVinoOptions
from adapters.openvino_backend.requests import Requests
from adapters.text.tokenizer import HFTokenizer

logger = logging.getLogger(__name__)

_BLOCK_TOKENS = {"CPU": 32, "GPU": 16}
"""KV positions of a block. Source: OpenVINO GenAI, continuous_batching/cache_manager.hpp."""
_PRECISIONS = {"fp32": "f32", "f32": "f32", "bf16": "bf16", "fp16": "f16", "f16": "f16"}
_DTYPES = {"f32": "fp32", "f16": "fp16"}
_EXPORTED = "openvino_model.xml"


class OpenVinoBackend:
    """A `Backend` for Llama folders, as a GGUF file made of them, and for folders exported to OpenVINO."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model and plan its cache; OpenVINO allocates the cache with the first step.

        Raises:
            ConfigError, UnsupportedModel, BackendError: with what to change.
        """
        files = resolve_model(config, FORMATS)
        options = config.options_as(OpenVinoOptions)
        device = "CPU" if config.device == "auto" else config.device.upper()
        num_threads = config.num_threads or default_threads()
        precision = _precision(config.dtype, device)
        kv_type = precision if options.ov_kv_type == "auto" else options.ov_kv_type
        model = json.loads((files.folder / "config.json").read_text("utf-8"))
        self._max_model_len = pick_model_len(config, trained_positions(model, config.model), config.model)
        path, weights = _model_path(files, config)
        scheduler = self._scheduler_config(config, options, _BLOCK_TOKENS.get(device.split(".")[0], 16))
        self._slots: dict[int, int] = {}
        """Tokens of each sequence that the scheduler counts as computed."""
        properties = {
            "INFERENCE_NUM_THREADS": num_threads,
            "sampler_num_threads": num_threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": kv_type,
        }
        try:
            self._pipeline: Any = genai.ContinuousBatchingPipeline(str(path), scheduler, device, properties)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot load {path} on {device}: {_reason(error)}") from error
        self._requests = Requests(self._pipeline, self._max_model_len)
        self._info = BackendInfo(
            backend="openvino",
            model=files.name,
            device=device.lower(),
            dtype=_DTYPES.get(precision, precision),
            vocab_size=model["vocab_size"],
            eos_token_ids=HFTokenizer.from_folder(files.folder).eos_token_ids,
            max_batch_size=config.max_batch_size,
            max_model_len=self._max_model_len,
            kv_capacity_tokens=min(
                options.ov_cache_tokens or 1 << 62, config.max_batch_size * self._max_model_len
            ),
            num_parameters=count_parameters(files.folder),
            model_digest=files.digest,
            num_threads=num_threads,
            details={
                "openvino_genai": genai.__version__,
                "weights": weights,
                "kv_type": kv_type,
                "num_kv_blocks": scheduler.num_kv_blocks,
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "dynamic_split_fuse": scheduler.dynamic_split_fuse,
                "prefix_caching": scheduler.enable_prefix_caching,
                "prompt_chunks": "kept, and computed whole with the last one",
                "rows_left_out": "computed ahead",
                "dead_rows": "answer on",
                "sampling": "OpenVINO's own generator, penalties and order of filters",
            },
        )

    def _scheduler_config(self, config: BackendConfig, options: OpenVinoOptions, block_tokens: int) -> Any:
        scheduler = genai.SchedulerConfig()
        blocks_of_slot = -(-self._max_model_len // block_tokens)
        num_tokens = options.ov_cache_tokens
        if num_tokens is not None and num_tokens < self._max_model_len:
            raise ConfigError(
                f"OV_CACHE_TOKENS={num_tokens} is less than one sequence of {self._max_model_len}"
            )
        scheduler.num_kv_blocks = (
            -(-num_tokens // block_tokens) + config.max_batch_size
            if num_tokens
            else config.max_batch_size * blocks_of_slot
        )
        scheduler.max_num_batched_tokens = (
            options.ov_max_num_batched_tokens or config.max_step_tokens + self._max_model_len
        )
        scheduler.max_num_seqs = config.max_batch_size
        scheduler.dynamic_split_fuse = options.ov_dynamic_split_fuse
        scheduler.enable_prefix_caching = options.ov_prefix_caching
        return scheduler

    @property
    def info(self) -> BackendInfo:
        return self._info

    def step(self, chunks: Seq[ScheduledChunk]) -> list[StepOutput]:
        """Steps the pipeline unless nobody has a token to come; a chunk inside a prompt computes nothing.

        Raises:
            BackendError: a chunk does not continue what its slot holds, or OpenVINO failed.
            CapacityError: more sequences than slots, or a sequence longer than a slot.
        """
        check_chunks(chunks, self._slots, self._info.max_batch_size, self._max_model_len)
        sampling = [chunk.seq for chunk in chunks if chunk.samples]
        for seq in sampling:
            self._requests.add(seq)
        if sampling:
            tokens = self._requests.step_until(seq.seq_id for seq in sampling)
        else:
            tokens = {}
            if any(chunk.dead for chunk in chunks):
                self._requests.step_once()
        for chunk in chunks:
            self._slots[chunk.seq.seq_id] = chunk.start + chunk.num_tokens
        return [StepOutput(seq_id, [token]) for seq_id, token in tokens.items()]

    def release(self, seq_ids: Seq[int]) -> None:
        for seq_id in seq_ids:
            self._slots.pop(seq_id, None)
            self._requests.cancel(seq_id)

    def figures(self) -> Mapping[EngineFigure, float]:
        told = self._pipeline.get_metrics()
        return {
            "kv_usage_ratio": told.cache_usage / 100,
            "kv_usage_peak_ratio": told.max_cache_usage / 100,
            "requests": told.requests,
            "scheduled_requests": told.scheduled_requests,
        }

    def close(self) -> None:
        if self._pipeline is not None:
            share = 100 * self.figures()["kv_usage_peak_ratio"]
            logger.info("OpenVINO used up to %.0f%% of its KV blocks", share)
            self.release([*self._slots])
            self._requests.step_once()  # it frees what was cancelled; else it complains of leaks at its end
            self._pipeline = None


def _model_path(files: ModelFiles, config: BackendConfig) -> tuple[Path, str]:
    """What OpenVINO loads, and the number format of its weights."""
    if (files.folder / _EXPORTED).is_file():
        return files.folder, "exported"
    packaged = PACKAGED.get(split_format(config, FORMATS)[0])  # a folder of that name is another model
    file_format = files.format or (packaged.file_format if packaged else "f16")
    return gguf_made_from(files, file_format, config, packaged).path, file_format


def _precision(dtype: str, device: str) -> str:
    """What OpenVINO computes in: DTYPE, else its own choice for the device.

    Raises:
        ConfigError: it has no such format, or no such device.
    """
    core = openvino.Core()
    if not any(device.split(".")[0] in known for known in core.available_devices):
        known = ", ".join(core.available_devices).lower()
        raise ConfigError(f"DEVICE={device.lower()}: OpenVINO finds {known} here")
    if dtype == "auto":
        own: str = core.get_property(device, "INFERENCE_PRECISION_HINT").to_string()
        return own if own in _PRECISIONS else "f32"  # it may leave the choice open
    if dtype not in _PRECISIONS:
        raise ConfigError(f"DTYPE={dtype}: BACKEND=openvino computes in fp32, bf16 or fp16")
    return _PRECISIONS[dtype]


def _reason(error: RuntimeError) -> str:
    """OpenVINO's last line; the ones before it are places in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"
