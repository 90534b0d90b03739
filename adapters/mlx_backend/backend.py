"""The MLX backend: any decoder of mlx-lm with full attention, run over a cache of slots."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx_lm.utils import get_total_parameters, load_model

from adapters.base import BackendConfig, BackendError, BackendInfo, ConfigError, UnsupportedModel
from adapters.description import HF_FORMATS
from adapters.mlx_backend import MlxOptions
from adapters.mlx_backend.decoder import MlxDecoder
from adapters.models.store import ModelFiles, pick_model_len, resolve_model, trained_positions
from adapters.slot_backend import SlotBackend
from adapters.text.tokenizer import HFTokenizer

_FORMATS = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
_DTYPES = {alias: _FORMATS[name] for alias, name in HF_FORMATS.items()}
_NAMES = {dtype: name for name, dtype in _FORMATS.items()}


class MlxBackend(SlotBackend):
    def __init__(self, config: BackendConfig) -> None:
        """Load the model and its cache.

        Raises:
            ConfigError, UnsupportedModel, BackendError: with what to change.
        """
        device = _use_device(config.device)
        files = resolve_model(config)
        wanted = files.format or config.dtype
        if wanted not in ("auto", *_DTYPES):
            raise ConfigError(f"DTYPE={wanted}: BACKEND=mlx has fp32, bf16 and fp16")
        if wanted == "auto" and device == "cpu":
            wanted = "fp32"
        model, described = _load(files)
        if wanted != "auto":
            model.set_dtype(_DTYPES[wanted])
        max_model_len = pick_model_len(config, trained_positions(described, config.model), config.model)
        num_slots = config.max_batch_size
        decoder = MlxDecoder(model, num_slots, max_model_len)
        blas = config.options_as(MlxOptions).mlx_blas
        quantization = described.get("quantization")
        info = BackendInfo(
            backend="mlx",
            model=files.name,
            device=device,
            dtype=_NAMES[decoder.dtype],
            vocab_size=decoder.vocab_size,
            eos_token_ids=HFTokenizer.from_folder(files.folder).eos_token_ids,
            max_batch_size=num_slots,
            max_model_len=max_model_len,
            kv_capacity_tokens=num_slots * max_model_len,
            num_parameters=get_total_parameters(model),
            model_digest=files.digest,
            details={
                "mlx": version("mlx"),
                "mlx_lm": version("mlx-lm"),
                "weights": f"{quantization['bits']} bits" if quantization else "as computed",
                "kv_bytes_per_token": decoder.kv_bytes_per_token,
                "blas": blas or "as packaged",
            },
        )
        super().__init__(decoder, info)


def _use_device(name: str) -> str:
    """Make it MLX's default, and say which one `auto` is.

    Raises:
        ConfigError: this MLX has no such device.
    """
    available = {"mps": mx.metal.is_available(), "cuda": mx.cuda.is_available(), "cpu": True}
    here = [kind for kind, is_here in available.items() if is_here]
    kind = here[0] if name == "auto" else name
    if kind not in here:
        raise ConfigError(f"DEVICE={name}: MLX has {' and '.join(here)} here")
    mx.set_default_device(mx.cpu if kind == "cpu" else mx.gpu)
    return kind


def _load(files: ModelFiles) -> tuple[Any, dict[str, Any]]:
    """The model, and what its folder says of it."""
    try:
        model, described = load_model(files.folder)
    except (TypeError, ValueError) as error:  # other tensors or settings, or no such architecture
        raise UnsupportedModel(f"mlx-lm cannot run {files.name}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise BackendError(f"mlx-lm cannot load {files.folder}: {error}") from error
    return model, described
