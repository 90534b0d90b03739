"""vLLM's `LLMEngine` in the engine's own process, one of its steps for each of the lab's.

This module imports no vllm, so that the backend's settings are known before it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.description import BackendDescription, option


@dataclass(frozen=True, slots=True)
class VllmOptions:
    vllm_max_num_batched_tokens: int | None = option(
        None, "Tokens of one step of vLLM. Unset: MAX_STEP_TOKENS, at least MAX_BATCH.", ge=1, le=10_000_000
    )
    vllm_cache_tokens: int | None = option(
        None, "KV positions of all slots together. Unset: MAX_BATCH slots of full length.", ge=1
    )
    vllm_prefix_caching: bool = option(False, "vLLM keeps the cache of prompts it has seen.")
    vllm_enforce_eager: bool = option(
        True, "vLLM runs the model as it is; false: it compiles it first, which takes a C++ compiler."
    )


DESCRIPTION = BackendDescription(
    make="adapters.vllm_backend.backend:VllmBackend",
    make_scheduling="adapters.vllm_backend.own_scheduling:VllmScheduling",
    own_environment=True,
    packages=("vllm",),
    options=VllmOptions,
    dtypes="auto is the format of the weights",
)
