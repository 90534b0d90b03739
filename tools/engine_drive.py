"""The engine without HTTP: prompts in, all of them answered, as the service would run them.

Also the arguments that the tools which do so share. Measures nothing itself: `publish` gets the step reports.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from adapters.base import Backend, BackendConfig, SamplingParams, Sequence
from services.engine.engine import Engine
from services.engine.limits import SchedulerLimits
from services.engine.message_loop import QueueInbox
from services.engine.messages import StepReport, Stop, Submit
from services.engine.policies import Policies
from services.engine.scheduler import Scheduler
from services.engine.spec import EngineSpec, build_engine
from services.strategies import VARIANTS
from services.strategies.base import StrategyConfig


@dataclass(frozen=True, slots=True)
class Work:
    """One prompt and the number of tokens to make from it."""

    token_ids: list[int]
    max_tokens: int
    ignore_eos: bool = True
    """False: the model may end its answer before."""
    client: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, rows, threads, dtype and the folder of results."""
    parser.add_argument(
        "--model", default=os.environ.get("MODEL", "lab-26m"), help="preset, folder or hub id"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32], help="rows of the timed steps")
    parser.add_argument("--threads", type=int, default=None, help="engine threads (default: cores - 1)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    add_out_argument(parser)


def cpu_config(args: argparse.Namespace, max_batch_size: int) -> BackendConfig:
    """The torch backend on a CPU as the arguments of `add_common_arguments` want it."""
    return BackendConfig(
        model=args.model,
        dtype=args.dtype,
        device="cpu",
        num_threads=args.threads,
        max_batch_size=max_batch_size,
    )


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "results")), help="result folder"
    )


def drive(
    backend: Backend,
    variant: str,
    work: list[Work],
    *,
    max_batch: int = 16,
    max_step_tokens: int = 512,
    pads_like_generate: bool = False,
    policies: Policies = Policies(),  # noqa: B008 frozen
    publish: Callable[[StepReport], None] = lambda report: None,
) -> None:
    """All prompts are there from the start; returns when the last one is answered.

    Strategies that take groups get the prompts in chunks of `max_batch`, as a client would send them.
    """
    info = backend.info
    limits = SchedulerLimits(
        info.kv_capacity_tokens,
        info.max_model_len,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        pads_like_generate=pads_like_generate,
    )
    strategy = VARIANTS[variant](StrategyConfig(max_batch=max_batch))
    scheduler = Scheduler(strategy, limits, info.eos_token_ids, policies)
    group_size = max_batch if strategy.takes_groups else 1
    _answer(work, group_size, lambda watched: Engine(backend, scheduler, publish=watched), publish)


def drive_spec(
    backend: Backend,
    spec: EngineSpec,
    work: list[Work],
    publish: Callable[[StepReport], None],
    *,
    one_at_a_time: bool = False,
) -> None:
    """As `drive`, with every setting of a service; `spec.backend` is not loaded, `backend` is there.

    With `one_at_a_time` a prompt is sent when the one before is answered, right after its last report.
    """
    takes_groups = VARIANTS[spec.variant].takes_groups and not one_at_a_time
    group_size = spec.backend.max_batch_size if takes_groups else 1
    _answer(work, group_size, partial(build_engine, spec, backend), publish, one_at_a_time=one_at_a_time)


def _answer(
    work: list[Work],
    group_size: int,
    make_engine: Callable[[Callable[[StepReport], None]], Engine],
    publish: Callable[[StepReport], None],
    *,
    one_at_a_time: bool = False,
) -> None:
    inbox = QueueInbox()
    num_left = len(work)
    begins = iter(range(0, len(work), group_size))

    def submit(first: int) -> None:
        group = work[first : first + group_size]
        arrival_s = time.monotonic()
        inbox.put(
            Submit(
                [
                    Sequence(
                        first + i,
                        item.token_ids,
                        SamplingParams(
                            max_tokens=item.max_tokens,
                            temperature=item.temperature,
                            top_p=item.top_p,
                            seed=item.seed,
                            ignore_eos=item.ignore_eos,
                        ),
                        group_id=first,
                        group_size=len(group),
                        arrival_s=arrival_s,
                        client=item.client,
                    )
                    for i, item in enumerate(group)
                ]
            )
        )

    def watched(report: StepReport) -> None:
        nonlocal num_left
        publish(report)
        num_ended = sum(update.finish_reason is not None for update in report.updates)
        num_left -= num_ended
        if not num_left:
            inbox.put(Stop())
        elif one_at_a_time and num_ended:
            submit(next(begins))

    for first in islice(begins, 1) if one_at_a_time else begins:
        submit(first)
    make_engine(watched).run(inbox)
