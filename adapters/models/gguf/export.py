"""From a Hugging Face folder of Llama's architecture to a GGUF file with the same weights.

Weights keep the number format they have, so nothing is rounded (norms become fp32, as llama.cpp wants them),
or become f16.
Tensors go from disk to disk one at a time, so memory stays small.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from adapters.base import ConfigError, UnsupportedModel
from adapters.models.gguf.vocab import add_vocab
from adapters.models.safetensors_file import StoredTensor, list_tensors

_TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
}
_COMPUTED = ("rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
_FORMAT_NAMES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def own_format(folder: Path) -> str:
    """The format that an export of this folder has: f32, f16 or bf16.

    Raises:
        ConfigError: there are no weights that can be read.
    """
    return _FORMAT_NAMES[_main_dtype(list_tensors(folder))]


def export_gguf(folder: Path, target: Path, name: str, *, as_f16: bool = False) -> None:
    """Write `target` from the model in `folder`; `name` is what the file calls itself.

    `as_f16` rounds the matrices to f16.

    Raises:
        UnsupportedModel: the architecture is not Llama's, or uses what its GGUF form has no word for.
        ConfigError: a file is missing or damaged.
    """
    config = _read_config(folder)
    tensors = list_tensors(folder)
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every file at INFO
    writer = gguf.GGUFWriter(target, "llama")
    try:
        writer.add_name(name)
        _add_shape(writer, config)
        writer.add_file_type(_FILE_TYPES["F16" if as_f16 else _main_dtype(tensors)])
        add_vocab(writer, folder, config["vocab_size"])
        plan = list(_plan(tensors, config))
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for gguf_name, tensor, _ in plan:
            kind = "F32" if len(tensor.shape) == 1 else "F16" if as_f16 else tensor.dtype
            num_bytes = math.prod(tensor.shape) * (4 if kind == "F32" else 2)
            writer.add_tensor_info(gguf_name, tensor.shape, np.dtype("<u2"), num_bytes, _TYPES[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for _, tensor, num_heads in plan:
            values = tensor.read()
            if num_heads:
                values = _interleaved(values, num_heads)
            if values.ndim == 1:
                values = _as_fp32(values, tensor.dtype)
            elif as_f16:
                values = _as_fp32(values, tensor.dtype).astype(np.float16)
            writer.write_tensor_data(values)
    finally:
        writer.close()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if config.get("model_type") != "llama" or config.get("num_local_experts"):
        raise UnsupportedModel(
            f"{folder} is a {config.get('model_type')} model; only Llama's architecture is exported to GGUF "
            "here. Give MODEL a .gguf file made by llama.cpp's own converter, or use BACKEND=torch"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"{folder} uses {config['hidden_act']}, which llama.cpp's Llama does not")
    return config


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings under today's names.

    Raises:
        UnsupportedModel: a scaling that the exporter does not know.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UnsupportedModel(
            f"{rope['rope_type']} rotary scaling is not exported; there are linear and llama3"
        )
    return rope


def _rope_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """By how much each rotary frequency is divided in Llama 3.1's scaling; None where there is none.

    Source: Llama 3.1's rule as transformers computes it (`modeling_rope_utils`).
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    wavelength = 2 * math.pi * base ** (np.arange(0, dim, 2) / dim)
    length, low, high = (
        rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((length / wavelength - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1.0 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors


def _plan(
    tensors: dict[str, StoredTensor], config: dict[str, Any]
) -> Iterator[tuple[str, StoredTensor, int]]:
    """Each tensor under its GGUF name, and the number of heads where its rows are to be interleaved."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    num_heads = config["num_attention_heads"]
    heads_of = {"q_proj": num_heads, "k_proj": config.get("num_key_value_heads") or num_heads}
    for name, tensor in tensors.items():
        if name.endswith(_COMPUTED) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UnsupportedModel(f"the tensor {name} has no counterpart in llama.cpp's Llama")
        yield gguf_name, tensor, heads_of.get(name.split(".")[-2], 0)


def _interleaved(values: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows of q and k in llama.cpp's order: it rotates neighbours where transformers rotates halves.

    Source: `LlamaModel.permute` of llama.cpp's converter.
    """
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _as_fp32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _main_dtype(tensors: dict[str, StoredTensor]) -> str:
    """The dtype of the matrices; all have the same in practice."""
    return next(tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1)
