"""`lab kv-curve`: what each KV policy makes of ever less memory, on the null backend.

All prompts of the corpus are there from the start, the strategy is `continuous`, and each answer takes its
whole budget, which is the worst case for `paged`. Time is computed from the steps and a cost model, so the
figures are the same on every machine; only the host's time for a step without pressure is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator

from adapters.base import BackendConfig
from adapters.null_backend import NullBackend
from harness.plan.corpus import default_path, load_corpus
from harness.results.table import render_table
from services.engine.messages import StepReport
from services.engine.policies import Policies
from tools.engine_drive import Work, drive


@dataclasses.dataclass(slots=True)
class Account:
    """One replay, in the time of the cost model."""

    step_s: float
    row_s: float
    prompt_token_s: float
    seconds: float = 0.0
    sequence_seconds: float = 0.0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_preempted: int = 0

    @property
    def mean_held(self) -> float:
        """Sequences that hold memory."""
        return self.sequence_seconds / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def add(self, report: StepReport) -> None:
        self.num_tokens += sum(len(update.token_ids) for update in report.updates)
        record = report.record
        if record is None:
            return
        seconds = self.step_s + self.row_s * record.num_decode_tokens
        seconds += self.prompt_token_s * record.num_prompt_tokens
        self.seconds += seconds
        # Those that ended with this step held memory while it was computed.
        num_held = report.num_running + sum(update.finish_reason is not None for update in report.updates)
        self.sequence_seconds += seconds * num_held
        self.num_prompt_tokens += record.num_prompt_tokens
        self.num_preempted += record.num_preempted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=300, help="prompts of the corpus")
    parser.add_argument(
        "--bytes-per-token", type=int, default=4, help="bytes of a prompt that make one token"
    )
    parser.add_argument("--rows", type=int, default=64, help="slots, so many that memory runs out first")
    parser.add_argument(
        "--capacities",
        type=int,
        nargs="+",
        default=[32_768, 8192, 4096, 2048, 1024],
        help="KV positions",
    )
    parser.add_argument("--watermarks", type=float, nargs="+", default=[0.0, 0.01, 0.05, 0.1, 0.3])
    parser.add_argument("--step-ms", type=float, default=5.0, help="the cost of a step")
    parser.add_argument("--row-ms", type=float, default=0.2, help="the cost of a decode row")
    parser.add_argument("--prompt-token-ms", type=float, default=0.1, help="the cost of a prompt token")
    parser.add_argument("--repeats", type=int, default=5, help="of the host's time, the policies in turns")


def run(args: argparse.Namespace) -> int:
    prompts = load_corpus(default_path()).prompts[: args.requests]
    work = [Work(_token_ids(p.prompt, args.bytes_per_token), p.max_tokens) for p in prompts]
    num_prompt_tokens = sum(len(item.token_ids) for item in work)
    rows = []
    for capacity in args.capacities:
        policies = [Policies(kv_capacity_tokens=capacity), *_paged(capacity, args.watermarks)]
        accounts = [_replay(args, work, one) for one in policies]
        for one, account in zip(policies, accounts, strict=True):
            recomputed = account.num_prompt_tokens / num_prompt_tokens - 1
            rows.append(
                [
                    f"{capacity}",
                    f"paged, {one.kv_watermark:g}" if one.kv_policy == "paged" else one.kv_policy,
                    f"{account.mean_held:.1f}",
                    f"{account.mean_held / accounts[0].mean_held:.2f}",
                    f"{account.tokens_per_s:.0f}",
                    f"{account.tokens_per_s / accounts[0].tokens_per_s:.2f}",
                    f"{account.num_preempted}",
                    f"{recomputed:.0%}",
                ]
            )
    names = [
        "KV",
        "policy, watermark",
        "held",
        "of reserve",
        "tok/s",
        "of reserve",
        "preempted",
        "recomputed",
    ]
    print(render_table(names, rows))
    print(_host_time(args, work))
    return 0


def _paged(capacity: int, watermarks: Iterable[float]) -> Iterator[Policies]:
    for watermark in watermarks:
        yield Policies(kv_policy="paged", kv_watermark=watermark, kv_capacity_tokens=capacity)


def _replay(args: argparse.Namespace, work: list[Work], policies: Policies) -> Account:
    account = Account(args.step_ms / 1e3, args.row_ms / 1e3, args.prompt_token_ms / 1e3)
    backend = NullBackend(BackendConfig(backend="null", max_batch_size=args.rows))
    drive(backend, "continuous", work, max_batch=args.rows, policies=policies, publish=account.add)
    return account


def _host_time(args: argparse.Namespace, work: list[Work]) -> str:
    """The least of several repeats: a busy machine adds to all the others."""
    least = dict.fromkeys(("reserve", "paged"), float("inf"))
    for _ in range(args.repeats):
        for name in least:
            begin_s = time.process_time()
            _replay(args, work, Policies(kv_policy=name))
            least[name] = min(least[name], time.process_time() - begin_s)
    share = least["paged"] / least["reserve"] - 1
    return f"Without pressure the host's whole work takes {share:+.1%} with paged."


def _token_ids(prompt: str | tuple[int, ...], bytes_per_token: int) -> list[int]:
    return list(prompt.encode()[::bytes_per_token] if isinstance(prompt, str) else prompt)
