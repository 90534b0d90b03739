"""The ONNX Runtime backend: a decoder as `export` makes it, run over a cache of slots."""

from __future__ import annotations

import json

import onnxruntime as ort

from adapters.base import BackendConfig, BackendInfo, ConfigError
from adapters.cores import default_threads
from adapters.models.safetensors_file import count_parameters
from adapters.models.store import pick_model_len, resolve_model, trained_positions
from adapters.onnx_backend import FORMATS, OnnxOptions
from adapters.onnx_backend.export import exported_model
from adapters.onnx_backend.session import DecoderSession, check_provider
from adapters.slot_backend import SlotBackend
from adapters.text.tokenizer import HFTokenizer


class OnnxBackend(SlotBackend):
    def __init__(self, config: BackendConfig) -> None:
        """Export the model where that has not been done, and load it.

        Raises:
            ConfigError, BackendError: with what to change.
        """
        files = resolve_model(config, FORMATS)
        wanted = files.format or ("fp32" if config.dtype == "auto" else config.dtype)
        if wanted not in FORMATS:
            known = " and ".join(sorted(set(FORMATS.values())))
            raise ConfigError(f"DTYPE={config.dtype}: BACKEND=onnx has {known}")
        precision, provider = FORMATS[wanted], config.options_as(OnnxOptions).onnx_provider
        check_provider(provider)
        model = json.loads((files.folder / "config.json").read_text("utf-8"))
        max_model_len = pick_model_len(config, trained_positions(model, config.model), config.model)
        num_threads = config.num_threads or default_threads()
        num_slots = config.max_batch_size
        path = exported_model(files, precision, config.artifacts_dir)
        session = DecoderSession(path, provider, num_threads, num_slots, max_model_len)
        info = BackendInfo(
            backend="onnx",
            model=files.name,
            device=provider,
            dtype=precision,
            vocab_size=session.vocab_size,
            eos_token_ids=HFTokenizer.from_folder(files.folder).eos_token_ids,
            max_batch_size=num_slots,
            max_model_len=max_model_len,
            kv_capacity_tokens=num_slots * max_model_len,
            num_parameters=count_parameters(files.folder),
            model_digest=files.digest,
            num_threads=num_threads,
            details={
                "onnxruntime": ort.__version__,
                "kv_type": "f32",
                "kv_bytes_per_token": session.kv_bytes_per_token,
            },
        )
        super().__init__(session, info)
