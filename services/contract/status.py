"""What a client may ask beside answers: health, the model and its settings, the log of steps."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from services.contract.timings import StepRecord


class Health(BaseModel):
    """`queue_depth` counts prompts without a slot."""

    status: Literal["ok", "starting", "draining", "failed"]
    active_requests: int
    queue_depth: int
    worker: Literal["running", "starting", "restarting", "failed", "in_process"]
    gpu_utilization: float | None = None
    """Share of time in which a kernel ran, 0 to 1, as NVML says; None without a GPU."""


class ModelCard(BaseModel):
    """`GET /model`. `client_chunk` is how many prompts a request should carry to suit the strategy."""

    model: str
    backend: str
    variant: str
    device: str
    dtype: str
    vocab_size: int
    eos_token_ids: list[int]
    max_batch_size: int
    max_model_len: int
    kv_capacity_tokens: int
    num_parameters: int
    model_digest: str
    scheduling: Literal["lab", "engine"]
    num_threads: int
    details: dict[str, str | int | float | bool]
    strategy: dict[str, str | int | float | bool]
    client_chunk: int
    max_queue: int
    settings: dict[str, str | int | float | bool | None]
    version: str
    pid: int | None = None
    """Of the process that answers, by which a client knows the service that it started."""


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "batching-lab"
    max_model_len: int


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class StepLine(BaseModel, StepRecord, frozen=True):
    """`StepRecord` as JSON. `start_s` is on the engine's monotonic clock; `num_rows` leaves dead rows out:
    those of finished sequences in a padded batch, and those whose sequence ended after the step was
    launched."""


class Steps(BaseModel):
    """`GET /steps?after=N`: steps N and later, 5,000 at most; ask with `next` for what follows them."""

    steps: list[StepLine]
    next: int
    num_dropped: int
