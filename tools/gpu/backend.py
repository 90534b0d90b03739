"""A part's backend, and work for it."""

from __future__ import annotations

import dataclasses
import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from adapters.base import BackendConfig, BackendError
from adapters.models.presets import PRESETS
from adapters.torch_backend import TorchOptions, factory, loading
from services.engine.messages import StepReport
from tools.engine_drive import Work, drive
from tools.gpu.measures import TorchModel
from tools.gpu.part import LOADED, PartRun
from tools.gpu.shape_model import fits_memory, shape_folder

_LESS = {"torch", "cpu_kernels", "attention_padding", "kv_bytes_per_token"}


def _tell_machine(part: PartRun) -> None:
    part.add_facts(torch_build=torch.__version__)
    if str(loading.pick_device(part.device)).startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        part.add_facts(
            device_name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            memory_gib=round(properties.total_memory / 2**30, 1),
            multiprocessors=properties.multi_processor_count,
        )


@contextmanager
def loadable(part: PartRun, max_batch_size: int | None = None) -> Iterator[BackendConfig]:
    """The configuration with which the part's model can be loaded while this lasts."""
    sizes, device = part.sizes, loading.pick_device(part.device)
    _tell_machine(part)
    config = BackendConfig(
        model=part.model,
        device=str(device),
        dtype=str(loading.pick_dtype(part.dtype, device)).removeprefix("torch."),
        max_batch_size=max_batch_size or max(*sizes.rows, *sizes.concurrency, *sizes.yardstick),
        max_step_tokens=sizes.max_step_tokens,
        artifacts_dir=part.artifacts_dir,
        options=TorchOptions(**part.options),
    )
    if part.real_weights or part.model not in PRESETS:
        yield config
        return
    with tempfile.TemporaryDirectory() as parent, shape_folder(part.model, Path(parent)) as folder:
        check_memory(part, config)
        yield dataclasses.replace(config, model=str(folder))


def check_memory(part: PartRun, config: BackendConfig) -> None:
    """Raises: BackendError where the weights of a preset do not fit into the memory that is free."""
    dtype = loading.DTYPES[config.dtype]
    if part.model in PRESETS and not fits_memory(part.model, config.device, dtype):
        raise BackendError(f"the weights of {part.model} in {dtype} do not fit into the memory that is free")


def load(part: PartRun, config: BackendConfig) -> TorchModel:
    part.say(f"loading {part.model} ... ({part.left_s:.0f} s left)")
    part.begin_loading()
    started_s = time.perf_counter()
    backend = factory.create(config)
    details, on_gpu = backend.info.details, config.device.startswith("cuda")
    part.add(
        LOADED, part.kind, dtype=backend.info.dtype, load_s=time.perf_counter() - started_s,
        max_model_len=backend.info.max_model_len,
        gib=torch.cuda.memory_allocated() / 2**30 if on_gpu else None,
        **{key: str(value) for key, value in details.items() if key not in _LESS},
    )  # fmt: skip
    return backend


class Info(Protocol):
    """The two facts of a model that work for it depends on."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ModelSize:
    vocab_size: int
    max_model_len: int


def make_work(part: PartRun, count: int, info: Info, max_tokens: int | None = None) -> list[Work]:
    """Prompts and budgets of seeded lengths, cut to what the model holds."""
    rng = random.Random(part.seed)
    shortest, longest = part.sizes.lengths
    longest = min(longest, info.max_model_len // 2)
    work = []
    for _ in range(count):
        num_prompt, num_new = rng.randint(shortest, longest), rng.randint(shortest, longest)
        ids = [rng.randrange(info.vocab_size) for _ in range(num_prompt)]
        work.append(Work(ids, max_tokens or num_new))
    return work


def drive_all(
    part: PartRun,
    backend: TorchModel,
    variant: str,
    work: list[Work],
    max_batch: int,
    publish: Callable[[StepReport], None] = lambda report: None,
) -> None:
    tokens = max(part.sizes.max_step_tokens, max_batch + 64)
    drive(backend, variant, work, max_batch=max_batch, max_step_tokens=tokens, publish=publish)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
