"""The torch backend: any supported Hugging Face causal LM as one batched step function.

This module imports no torch, so that the backend's settings are known before it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.description import BackendDescription, option


@dataclass(frozen=True, slots=True)
class TorchOptions:
    cpu_kernels: bool = option(
        True,
        "On a CPU: norms, rotation, attention, linear layers (in fp32 those whose weights are numbers of "
        "bf16), and in bf16 all of a Llama-shaped model, run in kernels that are compiled once with the "
        "system's C++ compiler (3 s; kept under ARTIFACTS_DIR/kernels). 0, or no compiler: torch's own "
        "operators, slower.",
    )
    cuda_graphs: bool = option(
        True,
        "On CUDA: steps are replayed as graphs, captured at start: those in which every row decodes for up "
        "to 256 rows, and those with prompts where Triton kernels run too. 0: operator by operator.",
    )
    triton_kernels: bool = option(
        True,
        "On CUDA: norms, rotation, cache writes, the attention of decode rows and the gate of Llama-shaped "
        "models run in Triton kernels, each checked at start. 0, or no Triton: torch's operators, slower.",
    )
    batch_invariant: bool = option(
        False,
        "On CUDA: the same tokens whatever the batch. Every linear layer then computes exactly 64 rows "
        "at a time, and attention never splits a row's keys by the batch; checked at start, with a warning "
        "where it does not hold. Slower. On a CPU it is always so, and this changes nothing.",
    )


DESCRIPTION = BackendDescription(
    make="adapters.torch_backend.factory:create",
    extra="torch",
    packages=("torch", "transformers", "safetensors"),
    options=TorchOptions,
    # There a prompt of so many tokens in one step costs what ten decode steps of sixteen rows cost (lab-26m).
    # A GPU computes hundreds of prompt tokens in the time of a decode step.
    long_prefill_token_thresholds={"cpu": 256},
)
