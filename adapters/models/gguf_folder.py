"""From a GGUF file of Llama's architecture to a Hugging Face folder: the reverse of `adapters.models.gguf`.

Quantized weights become fp32, which holds each value exactly. NumPy alone computes them, one tensor at a
time, so that every machine writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import UnsupportedModel
from adapters.models.preset_tokenizer import write_byte_level_bpe, write_json
from adapters.models.safetensors_file import safetensors_header

_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3
"""The GGUF type of a token that is no text."""
_DIGITS_ALONE = {"smollm"}
"""llama.cpp's names for GPT-2's way to cut text into words, with every digit a word of its own."""


def write_folder(source: Path, folder: Path, eos_token_ids: tuple[int, ...]) -> None:
    """Write a complete model folder. The folder exists and is empty.

    Raises:
        UnsupportedModel: the file holds another architecture, or a tokenizer of another kind.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama":
        raise UnsupportedModel(
            f"{source} is a {facts['general.architecture']} model, not Llama's architecture"
        )
    _write_tokenizer(facts, folder)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    write_json(folder / "config.json", _config(facts, eos_token_ids, tied=tied))
    ends = {"eos_token_id": list(eos_token_ids), "pad_token_id": facts["tokenizer.ggml.padding_token_id"]}
    write_json(folder / "generation_config.json", ends)
    shapes = {_name(t.name): tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    with (folder / "model.safetensors").open("wb") as file:
        file.write(safetensors_header(shapes.items(), "F32"))
        for values in _weights(reader, facts):
            file.write(np.ascontiguousarray(values, dtype="<f4").data)


def _config(facts: dict[str, Any], eos_token_ids: tuple[int, ...], *, tied: bool) -> dict[str, object]:
    num_heads, hidden = facts["llama.attention.head_count"], facts["llama.embedding_length"]
    theta = facts["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "max_position_embeddings": facts["llama.context_length"],
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        # A float32 of the file; its shortest decimal spelling is the number that was meant.
        "rms_norm_eps": float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": list(eos_token_ids),
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    kind, words = facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]
    if kind != "gpt2" or words not in _DIGITS_ALONE or facts["tokenizer.ggml.add_bos_token"]:
        raise UnsupportedModel(f"a GGUF tokenizer of the kind {kind}/{words} is not unpacked")
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(facts["tokenizer.ggml.token_type"]) if kind == _CONTROL]
    write_byte_level_bpe(
        folder,
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[merge.split(" ") for merge in facts["tokenizer.ggml.merges"]],
        special={i: tokens[i] for i in control},
        digits_alone=True,
        named={
            hf_name: tokens[facts[f"tokenizer.ggml.{name}_token_id"]]
            for hf_name, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        },
        max_tokens=facts["llama.context_length"],
        chat_template=facts["tokenizer.chat_template"],
    )


def _name(gguf_name: str) -> str:
    """A tensor's name in transformers' Llama."""
    part = gguf_name.removesuffix(".weight")
    if part.startswith("blk."):
        _, layer, part = part.split(".")
        return f"model.layers.{layer}.{_LAYER_PARTS[part]}.weight"
    return f"{_OUTER_PARTS[part]}.weight"


def _weights(reader: Any, facts: dict[str, Any]) -> Iterator[NDArray[Any]]:
    """The tensors in the file's order, rows of q and k where transformers wants them."""
    import gguf

    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        num_heads = facts.get(heads.get(tensor.name.split(".")[-2], ""))
        yield _in_halves(values, num_heads) if num_heads else values


def _in_halves(values: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows in transformers' order: it rotates halves of a head where llama.cpp rotates neighbours."""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
