"""From a model folder to a forward pass over mixed batches: device, dtype, weights, fast pieces.

A model that the batched attention cannot run is refused here, by name and with the reason, before its weights
are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.base import BackendError, ConfigError, UnsupportedModel
from adapters.torch_backend.cpu.build import cpu_capabilities
from adapters.torch_backend.cpu.kernels import CpuKernels
from adapters.torch_backend.model import hf_attention
from adapters.torch_backend.model.attention import StepLayout
from adapters.torch_backend.model.kernel_llama import KernelLlama
from adapters.torch_backend.model.linear import can_pack, make_linear
from adapters.torch_backend.model.llama_forward import FusedOps, LlamaForward
from adapters.torch_backend.model.llama_shape import llama_shape

logger = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "f32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "f16": torch.float16,
    "float16": torch.float16,
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_BATCH_WIDE_ROPE = {"longrope", "dynamic"}

Forward = Callable[[Tensor, StepLayout, Tensor], Tensor]


@dataclass(slots=True)
class LoadedModel:
    """A model; `forward(input_ids (T,), layout, logit_rows (n,))` gives `(n, vocabulary)`."""

    forward: Forward
    module: nn.Module
    """Holds the weights that `forward` uses."""
    dtype: torch.dtype
    device: torch.device
    config: Any
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    reference: Callable[[Tensor], Tensor]
    """The model's own forward, `(T,) -> logits (T, vocabulary)`."""


def pick_device(name: str) -> torch.device:
    """Raises: ConfigError for a device that torch does not have here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"DEVICE={name} is not a device that torch knows: use auto, cpu, cuda, cuda:N or mps"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "DEVICE=cuda, but torch finds no usable CUDA device here: use DEVICE=cpu or auto; "
            "a container sees a GPU with `docker run --gpus all`"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"DEVICE={name}, but there are {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("DEVICE=mps, but this machine has no Metal device: use DEVICE=cpu or auto")
    return device


def pick_dtype(
    name: str, device: torch.device, in_kernels: Callable[[], bool] = lambda: False
) -> torch.dtype:
    """`auto` on a CPU: bf16 where it has instructions for it, or where the compiled kernels compute the whole
    step (`in_kernels`, asked only then), else fp32. On an accelerator: bf16 or fp16."""
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if cpu_has_bf16() or in_kernels() else torch.float32
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16
    if name not in DTYPES:
        raise ConfigError(f"dtype {name} is not one that torch runs here: use auto, fp32, bf16 or fp16")
    return DTYPES[name]


def cpu_has_bf16() -> bool:
    """True where the CPU has instructions that multiply bf16."""
    capabilities = cpu_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def read_config(folder: Path) -> Any:
    """The model's configuration, once it is sure that the batched pass can run such a model.

    Raises:
        UnsupportedModel: the architecture cannot take part in mixed batches; the message says why.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BackendError(f"the model configuration in {folder} cannot be read: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{config.model_type} is not a causal language model of transformers")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not model_class._supports_attention_backend:
        raise UnsupportedModel(
            f"{model_class.__name__} does not use transformers' attention interface, so its requests cannot "
            "share a batch here; about 150 architectures can (Llama, Qwen, Mistral, Gemma 3, GPT-2, ...)"
        )
    text_config = config.get_text_config()
    unknown = set(getattr(text_config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        raise UnsupportedModel(
            f"{model_class.__name__} has layers of the kind {unknown.pop()}; the batched pass knows full and "
            "sliding attention only"
        )
    rope = set(_rope_types(getattr(config, "rope_parameters", None))) & _BATCH_WIDE_ROPE
    if rope:
        raise UnsupportedModel(
            f"{model_class.__name__} here uses {rope.pop()} rotary scaling, which depends on the longest "
            "request of the batch: one request would change the answers of the others"
        )
    return config


def _rope_types(parameters: Any) -> Iterator[str]:
    """Every rope_type in a rope dictionary, which some models nest one level deep by layer type."""
    if isinstance(parameters, dict):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)


def head_shape(text_config: Any) -> tuple[int, int, int]:
    """Query heads, key heads and the numbers of one head."""
    heads: int = text_config.num_attention_heads
    kv_heads: int = getattr(text_config, "num_key_value_heads", None) or heads
    head_dim: int = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return heads, kv_heads, head_dim


def read_weights(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of transformers with its weights on `device`, and with attention it is sure to have.

    A hook: a tool that makes its weights itself replaces this function (`tools.gpu.shape_model`).
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="eager"
    )
    return model.to(device)


def load_model(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Load the weights. `forward` works only after `make_batched`, `reference` only before it."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    hf_attention.register()
    try:
        model = read_weights(folder, config, dtype, device).eval()
    except torch.OutOfMemoryError as error:
        raise BackendError(
            f"the weights of MODEL={folder.name} do not fit into the memory of {device}: choose a smaller "
            "model or DTYPE=bf16"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BackendError(f"the weights in {folder} cannot be loaded: {error}") from error

    def reference(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
        return logits

    def forward(ids: Tensor, layout: StepLayout, logit_rows: Tensor) -> Tensor:
        logits: Tensor = model(
            input_ids=ids[None],
            position_ids=layout.positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
            lab_layout=layout,
        ).logits[0]
        return logits

    generation = getattr(model, "generation_config", None)
    eos = {
        *_as_ids(getattr(config, "eos_token_id", None)),
        *_as_ids(getattr(generation, "eos_token_id", None)),
    }
    num_parameters = sum(p.numel() for p in model.parameters())
    return LoadedModel(forward, model, dtype, device, config, tuple(sorted(eos)), num_parameters, reference)


def make_batched(
    loaded: LoadedModel,
    *,
    fast: bool,
    kernels: CpuKernels | None,
    max_len: int,
    tiled: bool,
    joined: bool,
    fused: FusedOps | None = None,
) -> str:
    """Switch `loaded` from the model's own attention to the slot cache, with faster pieces if any.

    With `tiled`, every linear layer is one of ours, whose rows can be computed in tiles of a fixed number;
    with `joined`, gate and up of the faster pieces are one product; `fused` takes part in the latter alone.

    Returns the name of the path taken: "llama" (only with `fast`) or "generic".
    """
    packed = can_pack(loaded.dtype, loaded.device)
    module: Any = loaded.module
    shape = llama_shape(loaded.config) if fast else None
    if shape is not None:
        if kernels is not None and KernelLlama.covers(shape, kernels):
            loaded.module = KernelLlama(module, shape, kernels, max_len)
        else:
            loaded.module = LlamaForward(
                module,
                shape,
                packed=packed,
                kernels=kernels,
                max_len=max_len,
                joined=joined,
                fused=fused,
            )
        loaded.forward = loaded.module.forward
        return "llama"
    if tiled:
        _replace_linears(module, packed, kernels)
    module.set_attn_implementation(hf_attention.IMPLEMENTATION)
    return "generic"


def _replace_linears(module: nn.Module, packed: bool, kernels: CpuKernels | None) -> None:
    """Replace every linear layer by one of ours, GPT-2's transposed kind included."""
    from transformers.pytorch_utils import Conv1D

    for name, child in module.named_children():
        if type(child) is nn.Linear or isinstance(child, Conv1D):
            weight = child.weight.data if type(child) is nn.Linear else child.weight.data.t().contiguous()
            bias = None if child.bias is None else child.bias.data
            setattr(module, name, make_linear(weight, bias, packed=packed, kernels=kernels))
        else:
            _replace_linears(child, packed, kernels)


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
