"""A calibration out of a data sheet: what bandwidth, arithmetic and memory allow a preset model at best."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from adapters.base import BackendConfig, BackendInfo, ConfigError
from harness.simulator.calibration import Calibration
from harness.simulator.costs import RooflineCost

_BYTES_PER_NUMBER = 2
"""bf16, for weights, keys and values."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """As data sheets tell it: 10^9 bytes/s, 10^12 operations/s in bf16 without sparsity, 10^9 bytes."""

    gb_per_s: float
    tflops: float
    memory_gb: float
    launch_ms: float = 0.0
    """What a step costs beside memory and arithmetic."""


def roofline(model: str, hardware: Hardware) -> Calibration:
    """
    Raises:
        ConfigError: there is no such preset, or its weights leave no room for a sequence.
    """
    from adapters.models.presets import PRESETS  # with tokenizers: 5 MB that no other simulation needs

    if model not in PRESETS:
        raise ConfigError(f"roofline: {model!r} is no preset: it must be one of {', '.join(PRESETS)}")
    shape, config = PRESETS[model], BackendConfig()
    weight_bytes = _BYTES_PER_NUMBER * shape.num_parameters
    num_read = (
        shape.num_parameters - shape.vocab_size * shape.hidden_size
    )  # a step reads few rows of the embedding
    kv_bytes = 2 * _BYTES_PER_NUMBER * shape.num_layers * shape.num_kv_heads * shape.head_dim
    free_bytes = config.kv_memory_fraction * (hardware.memory_gb * 1e9 - weight_bytes)
    kv_tokens = int(free_bytes // kv_bytes)
    if kv_tokens < shape.max_positions:
        raise ConfigError(
            f"roofline: {hardware.memory_gb:g} GB do not hold {model} ({weight_bytes / 1e9:.1f} GB) and one "
            "sequence"
        )
    info = BackendInfo(
        backend="torch",
        model=model,
        device="on paper",
        dtype="bfloat16",
        vocab_size=shape.vocab_size,
        eos_token_ids=(),
        max_batch_size=config.max_batch_size,
        max_model_len=shape.max_positions,
        kv_capacity_tokens=kv_tokens,
        num_parameters=shape.num_parameters,
    )
    return Calibration(
        name=f"{model}, {hardware.gb_per_s:g} GB/s, {hardware.tflops:g} TFLOP/s",
        source="roofline",
        info=asdict(info),
        base={"BACKEND": "torch", "MODEL": model},
        cost=RooflineCost(
            bytes_per_s=hardware.gb_per_s * 1e9,
            flops_per_s=hardware.tflops * 1e12,
            weight_bytes=_BYTES_PER_NUMBER * num_read,
            num_parameters=num_read,
            kv_bytes_per_token=kv_bytes,
            # A query and a key, then a weight and a value: a multiplication and an addition each.
            attention_flops_per_pair=4 * shape.num_layers * shape.num_heads * shape.head_dim,
            launch_s=hardware.launch_ms / 1000,
        ),
    )
