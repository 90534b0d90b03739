"""Policies on a loaded model without HTTP: the same prompts under each arm in turns, in one process.

    MAX_BATCH=32 KV_CAPACITY_TOKENS=4096 python -m tools.policy_turns continuous continuous@KV_POLICY=paged

Settings that all arms share come from the environment, as with `make compare`. All prompts wait from the
start, so that the figures beside the times are counts, the same on any machine (but for aging, which goes
by the clock). Times are of this process's CPU: what others do on the machine takes no part. Ratios are to
the first arm, paired by turn, without what a place in a turn does, with 95% intervals over turns.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from adapters.base import Backend, LabError
from adapters.registry import create_backend, load_tokenizer
from harness.comparing.arms import parse_arm, williams_row
from harness.comparing.intervals import FEWEST_BLOCKS, log_interval, middle_and_error, without_order
from harness.comparing.verdict import CONFIDENCE
from harness.plan.corpus import default_path, load_corpus
from harness.plan.synthetic import synthetic_corpus, synthetic_ids
from harness.results.table import render_table
from services.engine.messages import StepReport
from services.engine.spec import EngineSpec
from services.read_settings import read_settings
from tools.engine_drive import Work, drive_spec
from tools.result_file import write_rows

TIMES = {"tokens_per_s": "tok/s", "mean_ttft_s": "mean TTFT (s)", "gap_p99_ms": "gap p99 (ms)"}
COUNTS = {
    "num_steps": "steps",
    "mean_running": "running",
    "mean_running_full": "while others wait",
    "max_running": "most",
    "num_preempted": "preempted",
    "recomputed_share": "computed again",
    "dead_share": "dead rows",
    "hit_share": "found in cache",
    "num_equal": "same answers",
}

ArmT = TypeVar("ArmT")
Answers = Mapping[int, list[int]]
"""Tokens, by `seq_id`."""


class Account:
    """What the reports of one run say; `row` has the columns of `TIMES` and `COUNTS`.

    Tokens that are computed again after a preemption count as a share of all prompts.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self.answers: defaultdict[int, list[int]] = defaultdict(list)
        self._at_s: defaultdict[int, list[float]] = defaultdict(list)
        self._running: list[int] = []
        self._is_full: list[bool] = []
        self._sums: defaultdict[str, int] = defaultdict(int)
        self._began_s = time.process_time()

    def add(self, report: StepReport) -> None:
        now_s = time.process_time() - self._began_s
        for update in report.updates:
            if update.error:
                raise LabError(update.error)
            self.answers[update.seq_id] += update.token_ids
            self._at_s[update.seq_id].append(now_s)
        record = report.record
        if record is None:
            return
        # Those that ended with this step held their memory while it was computed.
        num_ended = sum(update.finish_reason is not None for update in report.updates)
        self._running.append(report.num_running + num_ended)
        self._is_full.append(report.queue_depth > 0)
        for name in ("rows", "dead_rows", "preempted", "prompt_tokens", "looked_up_tokens", "cached_tokens"):
            self._sums[name] += getattr(record, f"num_{name}")

    def row(self) -> dict[str, float]:
        cpu_s = time.process_time() - self._began_s
        sums, running = self._sums, np.array(self._running)
        num_tokens = sum(map(len, self.answers.values()))
        gaps = np.concatenate([np.diff(stamps) for stamps in self._at_s.values()])
        full = running[self._is_full]
        return {
            "cpu_s": cpu_s,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / cpu_s,
            "mean_ttft_s": float(np.mean([stamps[0] for stamps in self._at_s.values()])),
            "gap_p99_ms": 1e3 * float(np.percentile(gaps, 99)) if len(gaps) else 0.0,
            "num_steps": len(running),
            "mean_running": float(running.mean()),
            "mean_running_full": float(full.mean()) if len(full) else 0.0,
            "max_running": int(running.max()),
            "num_preempted": sums["preempted"],
            "recomputed_share": (sums["prompt_tokens"] + sums["cached_tokens"]) / self._num_prompt_tokens - 1,
            "dead_share": sums["dead_rows"] / (sums["rows"] + sums["dead_rows"]),
            "hit_share": sums["cached_tokens"] / max(1, sums["looked_up_tokens"]),
        }


def make_work(args: argparse.Namespace, spec: EngineSpec) -> list[Work]:
    """The prompts, with the common beginnings that are asked for."""
    if args.synthetic:
        made_up = synthetic_corpus(args.synthetic, args.requests, seed=0).prompts
        return [Work([int(i) for i in p.prompt], p.max_tokens) for p in made_up]
    tokenizer = load_tokenizer(spec.backend)
    prompts = load_corpus(default_path()).prompts[: args.requests]
    work = []
    for number, prompt in enumerate(prompts):
        begins = f"begins-{number * args.prefixes // len(prompts)}"
        shared = synthetic_ids(begins, args.prefix_tokens, seed=0) if args.prefixes else ()
        work.append(Work([*shared, *tokenizer.encode(str(prompt.prompt))], prompt.max_tokens))
    return work


def measure(backend: Backend, work: list[Work], spec: EngineSpec) -> tuple[dict[str, float], Answers]:
    account = Account(sum(len(item.token_ids) for item in work))
    drive_spec(backend, spec, work, account.add)
    return account.row(), account.answers


def take_turns(
    arms: Mapping[str, ArmT],
    run: Callable[[ArmT], tuple[dict[str, float], Answers]],
    num_turns: int,
    *,
    warms_up: bool,
) -> Iterator[dict[str, Any]]:
    """One row a run of an arm, with how many of its answers are those of the first run.

    With `warms_up` one turn goes before: memory is mapped when it is first written.
    """
    names = list(arms)
    truth: Answers = {}
    for turn in range(-1 if warms_up else 0, num_turns):
        for place, index in enumerate(williams_row(len(names), max(turn, 0))):
            print(f"turn {turn + 1}/{num_turns}: {names[index]}", file=sys.stderr, flush=True)
            gc.collect()
            row, answers = run(arms[names[index]])
            truth = truth or answers
            num_equal = sum(answers[seq_id] == answer for seq_id, answer in truth.items())
            if turn >= 0:
                yield {"arm": names[index], "turn": turn, "place": place, **row, "num_equal": num_equal}


def turns_table(frame: pd.DataFrame, arms: Sequence[str]) -> str:
    """Means over turns; times with their ratios to the first arm. Counts that no arm has are left out."""
    counts = {column: name for column, name in COUNTS.items() if frame[column].any()}
    ratios = {column: ratio_texts(frame, arms, column) for column in TIMES}
    lines = []
    for arm in arms:
        means = {c: float(frame.loc[frame["arm"] == arm, c].mean()) for c in (*TIMES, *counts)}
        lines.append([arm, *(f"{mean:.4g}{ratios.get(c, {}).get(arm, '')}" for c, mean in means.items())])
    return render_table(["arm", *TIMES.values(), *counts.values()], lines)


def ratio_texts(frame: pd.DataFrame, arms: Sequence[str], column: str) -> dict[str, str]:
    """As ` (1.01x [1.00-1.02])`; nothing for the first arm, or for too few turns."""
    by_arm = frame.pivot(index="arm", columns="turn", values=column).loc[list(arms)].to_numpy()
    places = frame.pivot(index="arm", columns="turn", values="place").loc[list(arms)].to_numpy()
    texts = dict.fromkeys(arms, "")
    if by_arm.shape[1] < FEWEST_BLOCKS or by_arm.min() <= 0:
        return texts
    logs, extra, lost = without_order(np.log(by_arm / by_arm[0]), places, 0)
    for index, arm in enumerate(arms[1:], start=1):
        middle, _ = middle_and_error(logs[index])
        low, high = log_interval(logs[index], CONFIDENCE, extra_variance=extra[index], lost_degrees=lost)
        texts[arm] = f" ({np.exp(middle):.3f}x [{np.exp(low):.3f}-{np.exp(high):.3f}])"
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arms", nargs="+", help="as continuous@KV_POLICY=paged,KV_WATERMARK=0.1")
    parser.add_argument("--requests", type=int, default=96, help="prompts of the corpus (default 96)")
    parser.add_argument("--turns", type=int, default=8, help="of all arms (default 8)")
    parser.add_argument("--synthetic", metavar="SPEC", help="prompts made up instead, as 384+128x16")
    parser.add_argument(
        "--prefixes", type=int, default=0, help="so many groups of prompts, each with a beginning of its own"
    )
    parser.add_argument("--prefix-tokens", type=int, default=256, help="of such a beginning (default 256)")
    parser.add_argument("--out", type=Path, help="the rows, as parquet")
    args = parser.parse_args()
    specs = {}
    for arm in args.arms:
        variant, own = parse_arm(arm)
        settings = read_settings({"variant": variant, **own})
        if settings.scheduling == "engine":
            parser.error(f"{arm}: the engine's own scheduler takes no turns here")
        if arm in specs:
            parser.error(f"{arm} is named twice")
        specs[arm] = settings.engine_spec()
    configs = [spec.backend for spec in specs.values()]
    most = max(config.max_batch_size for config in configs)
    one, *more = (replace(config, max_batch_size=most) for config in configs)
    if any(other != one for other in more):
        parser.error("the arms share one backend: they may differ in policies and MAX_BATCH alone")
    backend = create_backend(one)
    work = make_work(args, specs[args.arms[0]])
    info = backend.info
    asked = {name: value for name, value in vars(args).items() if name != "out"}
    rows = []
    run = partial(measure, backend, work)
    for row in take_turns(specs, run, args.turns, warms_up=args.turns > 1):
        rows.append(row)
        frame = pd.DataFrame(rows)
        if args.out:  # each time, so that what is measured outlives a kill
            write_rows(frame, args.out, {"asked": asked, "backend": asdict(info)})
    print(f"{info.model}, {info.dtype}, {info.num_threads} engine thread(s), {len(work)} prompts\n")
    print(turns_table(frame, args.arms))
    backend.close()


if __name__ == "__main__":
    main()
