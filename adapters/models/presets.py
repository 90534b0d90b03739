"""Models whose weights are drawn from a seed: real shapes and real timing, text that is noise.

Weights are odd 8-bit integers of a counter-based generator times a power of two. So bf16, fp16 and fp32 hold
them exactly, and every machine makes the same bytes. Tensors are written in pieces: memory stays small at any
model size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.base import ConfigError
from adapters.data_files import DATA
from adapters.models.preset_tokenizer import END_OF_TEXT_ID, write_json, write_tokenizer
from adapters.models.safetensors_file import safetensors_header

CORPUS_PATH = DATA / "prompts.jsonl"
MAX_SHARD_BYTES = 4_000_000_000
RECIPE = 1
"""Goes up when the same preset would get other weights; a model made by another recipe is made anew."""
_PIECE_WEIGHTS = 1 << 22

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A Llama shape. `max_positions` is the longest prompt and answer together, in tokens."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float = 10_000.0
    max_positions: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_weights for tensor in tensors(self))


PRESETS = {
    "lab-26m": Preset(512, 1536, 8, 8, 4, vocab_size=4096),
    "lab-110m": Preset(768, 2048, 12, 12, 4, vocab_size=8192),
    # TinyLlama-1.1B's shape, with room for longer prompts.
    "lab-1b": Preset(2048, 5632, 22, 32, 4, vocab_size=32_000),
    # Llama-3-8B's shape.
    "lab-8b": Preset(4096, 14_336, 32, 32, 8, 128_256, rope_theta=500_000.0, max_positions=8192),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model. `exponent` scales its integers; None means that all are 1 (norms)."""

    name: str
    shape: tuple[int, ...]
    exponent: int | None

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return 2 * self.num_weights


def tensors(preset: Preset) -> Iterator[Tensor]:
    """All tensors in the order in which they are written.

    The gains were tried out: with them greedy text keeps changing instead of falling into a loop, the
    best of the logits stands clear of the next, and fp32 rounding does not grow into other tokens.
    """
    hidden, ffn, num_layers = preset.hidden_size, preset.intermediate_size, preset.num_layers
    attention, kv = preset.num_heads * preset.head_dim, preset.num_kv_heads * preset.head_dim
    depth = math.sqrt(8 / num_layers)  # deeper models add smaller steps, so that the last layers still count

    def matrix(name: str, rows: int, columns: int, gain: float) -> Tensor:
        return Tensor(f"{name}.weight", (rows, columns), _exponent(columns, gain))

    def norm(name: str) -> Tensor:
        return Tensor(f"{name}.weight", (hidden,), None)

    yield Tensor("model.embed_tokens.weight", (preset.vocab_size, hidden), _exponent(1, 0.6))
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        yield norm(f"{at}.input_layernorm")
        yield matrix(f"{at}.self_attn.q_proj", attention, hidden, 1.6)
        yield matrix(f"{at}.self_attn.k_proj", kv, hidden, 1.6)
        yield matrix(f"{at}.self_attn.v_proj", kv, hidden, 0.8)
        yield matrix(f"{at}.self_attn.o_proj", hidden, attention, 0.8 * depth)
        yield norm(f"{at}.post_attention_layernorm")
        yield matrix(f"{at}.mlp.gate_proj", ffn, hidden, 0.8)
        yield matrix(f"{at}.mlp.up_proj", ffn, hidden, 0.8)
        yield matrix(f"{at}.mlp.down_proj", hidden, ffn, 1.4 * depth)
    yield norm("model.norm")
    yield matrix("lm_head", preset.vocab_size, hidden, 3.2)


def _exponent(fan_in: int, gain: float) -> int:
    """The power of two by which a product with inputs of size 1 gets about the size `gain`."""
    spread = math.sqrt((256**2 - 1) / 3)  # standard deviation of odd integers from -255 to 255
    return round(math.log2(gain / (spread * math.sqrt(fan_in))))


def bf16_bits(preset_name: str, tensor: Tensor) -> Iterator[NDArray[np.uint16]]:
    """The weights in row order as bfloat16 bit patterns, in pieces."""
    generator = np.random.Philox(key=np.frombuffer(_key(preset_name, tensor.name), dtype="<u8"))
    bits_of_byte = _bf16_of_bytes(tensor.exponent)
    for start in range(0, tensor.num_weights, _PIECE_WEIGHTS):
        num = min(_PIECE_WEIGHTS, tensor.num_weights - start)
        if tensor.exponent is None:
            yield np.full(num, bits_of_byte[0], dtype="<u2")
            continue
        raw = generator.random_raw(-(-num // 8))
        yield bits_of_byte[raw.astype("<u8", copy=False).view(np.uint8)[:num]]


def _key(preset_name: str, tensor_name: str) -> bytes:
    return hashlib.sha256(f"seeded weights {RECIPE}/{preset_name}/{tensor_name}".encode()).digest()[:16]


def _bf16_of_bytes(exponent: int | None) -> NDArray[np.uint16]:
    """bfloat16 is the upper half of float32; 8 significant bits fit into it without rounding."""
    odd = 2.0 * np.arange(256) - 255.0
    values = np.ones(256) if exponent is None else odd * 2.0**exponent
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def write_model(preset_name: str, folder: Path, progress: Progress | None = None) -> None:
    """Write a complete model folder. The folder exists and is empty.

    Raises:
        ConfigError: the corpus that the tokenizer is trained on is missing.
    """
    preset = PRESETS[preset_name]
    write_tokenizer(_corpus_texts(), preset.vocab_size, folder)
    write_json(folder / "config.json", hf_config(preset))
    write_json(
        folder / "generation_config.json", {"eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}
    )
    _write_weights(preset_name, preset, folder, progress or (lambda done, total: None))


def _corpus_texts() -> list[str]:
    if not CORPUS_PATH.is_file():
        raise ConfigError(
            f"{CORPUS_PATH} is missing; `make prompts` writes it, and seeded models take their words from it"
        )
    return [json.loads(line)["prompt"] for line in CORPUS_PATH.read_text("utf-8").split("\n") if line]


def hf_config(preset: Preset) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.intermediate_size,
        "num_hidden_layers": preset.num_layers,
        "num_attention_heads": preset.num_heads,
        "num_key_value_heads": preset.num_kv_heads,
        "head_dim": preset.head_dim,
        "vocab_size": preset.vocab_size,
        "max_position_embeddings": preset.max_positions,
        "rope_theta": preset.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": preset.rope_theta},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": None,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _write_weights(preset_name: str, preset: Preset, folder: Path, progress: Progress) -> None:
    """One safetensors file, or several and their index where one would pass `MAX_SHARD_BYTES`."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors(preset):
        if shards[-1] and sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    total = 2 * preset.num_parameters
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        with (folder / name).open("wb") as file:
            file.write(safetensors_header([(t.name, t.shape) for t in shard], "BF16"))
            for tensor in shard:
                weight_map[tensor.name] = name
                for bits in bf16_bits(preset_name, tensor):
                    file.write(bits.data)
                    done += bits.nbytes
                    progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
