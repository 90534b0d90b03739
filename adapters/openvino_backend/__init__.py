"""OpenVINO GenAI's `ContinuousBatchingPipeline`, one of its steps for each of the lab's.

This module imports no openvino, so that the backend's settings are known before it is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters.description import BackendDescription, option

FORMATS = {"f16": "f16", "fp16": "f16", "q8_0": "q8_0", "q4_1": "q4_1", "q4_k_m": "q4_k_m"}
"""Of the GGUF file that is made of a Hugging Face folder. OpenVINO's reader knows no f32 and no bf16."""


@dataclass(frozen=True, slots=True)
class OpenVinoOptions:
    ov_max_num_batched_tokens: int | None = option(
        None,
        "Tokens of one step of OpenVINO. Unset: MAX_STEP_TOKENS and one prompt of full length, so that it "
        "needs no second step for one of the lab's.",
        ge=1,
        le=10_000_000,
    )
    ov_dynamic_split_fuse: bool = option(
        True, "OpenVINO computes prompts and rows together; false: prompts first, rows after them."
    )
    ov_cache_tokens: int | None = option(
        None, "KV positions of all slots together. Unset: MAX_BATCH slots of full length.", ge=1
    )
    ov_prefix_caching: bool = option(False, "OpenVINO keeps the cache of prompts it has seen.")
    ov_kv_type: Literal["auto", "f32", "f16", "bf16", "u8"] = option(
        "auto",
        "Number format of keys and values: auto, f32, f16, bf16 or u8. auto is the format that OpenVINO "
        "computes in; OpenVINO's own default on a CPU is u8.",
    )


DESCRIPTION = BackendDescription(
    make="adapters.openvino_backend.backend:OpenVinoBackend",
    extra="openvino",
    packages=("openvino", "openvino_genai"),
    options=OpenVinoOptions,
    formats=FORMATS,
    dtypes="what it computes in; auto is its own choice for the device",
)
