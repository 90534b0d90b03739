"""What a hit in the prefix cache saves: the time to the first token of a prompt that nobody else delays.

    python -m tools.prefix_ttft --tokens 512 --prompts 8 --turns 8

One prompt at a time, through the engine without HTTP, answered with one token. Each arm takes the same
prompts, which share nothing, and before each one another that shares as much of its beginning as is to be
found. Times are of this process's CPU. Ratios are to `paged` without a cache, paired by turn, with 95%
intervals over turns. The line below the table is the least-squares fit of `fixed + share left * prompt`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from adapters.base import Backend, LabError
from adapters.registry import create_backend
from harness.plan.synthetic import synthetic_ids
from harness.results.table import render_table
from services.engine.messages import StepReport
from services.engine.spec import EngineSpec
from services.read_settings import read_settings
from tools.engine_drive import Work, drive_spec
from tools.policy_turns import Answers, ratio_texts, take_turns
from tools.result_file import write_rows

SHARES = (0.0, 0.25, 0.5, 0.75)
NO_CACHE = "no cache"


class FirstTokens:
    """The first tokens of prompts that come one at a time, and how long each took, by `seq_id`."""

    def __init__(self) -> None:
        self.answers: dict[int, list[int]] = {}
        self.ttft_s: dict[int, float] = {}
        self.num_cached_tokens = 0
        self._sent_s = time.process_time()

    def add(self, report: StepReport) -> None:
        now_s = time.process_time()
        for update in report.updates:
            if update.error:
                raise LabError(update.error)
            self.answers[update.seq_id] = update.token_ids
            self.ttft_s[update.seq_id] = now_s - self._sent_s
            self._sent_s = now_s
        if report.record:
            self.num_cached_tokens += report.record.num_cached_tokens


def measure(
    backend: Backend, prompts: list[tuple[int, ...]], arm: tuple[EngineSpec, float]
) -> tuple[dict[str, float], Answers]:
    """The prompts once, each after one with the same first share of it, as `arm` says."""
    spec, share = arm
    work = []
    for number, prompt in enumerate(prompts):
        common = prompt[: round(share * len(prompt))]
        other_end = synthetic_ids(f"end-{number}", 16, seed=0)
        work += [Work([*common, *other_end], max_tokens=1), Work(list(prompt), max_tokens=1)]
    tokens = FirstTokens()
    drive_spec(backend, spec, work, tokens.add, one_at_a_time=True)
    asked = range(1, len(work), 2)
    row = {
        "share": share,
        "ttft_s": float(np.mean([tokens.ttft_s[seq_id] for seq_id in asked])),
        "hit_share": tokens.num_cached_tokens / sum(map(len, prompts)),
    }
    return row, {seq_id: tokens.answers[seq_id] for seq_id in asked}


def affine_fit(shares: list[float], times_s: list[float]) -> tuple[float, float]:
    """`(fixed, prompt)` of `fixed + (1 - share) * prompt`."""
    slope, fixed = np.polyfit(1 - np.array(shares), times_s, 1)
    return float(fixed), float(slope)


def table(frame: pd.DataFrame, arms: dict[str, tuple[EngineSpec, float]]) -> str:
    means = frame.groupby("arm")[["ttft_s", "hit_share", "num_equal"]].mean()
    cached = [arm for arm in arms if arm != NO_CACHE]
    fixed, prompt = affine_fit([arms[a][1] for a in cached], [means["ttft_s"][a] for a in cached])
    ratios = ratio_texts(frame, list(arms), "ttft_s")
    lines = []
    for arm, (_, share) in arms.items():
        mean = means.loc[arm]
        of_fit = mean["ttft_s"] / (fixed + (1 - share) * prompt)
        cells = [f"{mean['hit_share']:.1%}", f"{1e3 * mean['ttft_s']:.1f}{ratios[arm]}", f"{1 - share:.2f}"]
        lines.append([arm, *cells, f"{of_fit:.3f}", f"{mean['num_equal']:.4g}"])
    names = ["arm", "found", "TTFT (ms)", "share left", "TTFT / fit", "same answers"]
    fit = f"fit of the arms with a cache: {1e3 * fixed:.1f} ms + share left * {1e3 * prompt:.1f} ms"
    return f"{render_table(names, lines)}\n{fit}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt (default 512)")
    parser.add_argument("--prompts", type=int, default=8, help="in each run (default 8)")
    parser.add_argument("--turns", type=int, default=8, help="of all arms (default 8)")
    parser.add_argument("--out", type=Path, help="the rows, as parquet")
    args = parser.parse_args()
    plain = read_settings({"variant": "continuous", "kv_policy": "paged"}).engine_spec()
    cached = replace(plain, policies=replace(plain.policies, prefix_cache=True))
    arms = {NO_CACHE: (plain, 0.0), **{f"{share:.0%}": (cached, share) for share in SHARES}}
    backend = create_backend(plain.backend)
    prompts = [synthetic_ids(f"prompt-{number}", args.tokens, seed=0) for number in range(args.prompts)]
    info = backend.info
    asked = {name: value for name, value in vars(args).items() if name != "out"}
    run = partial(measure, backend, prompts)
    frame = pd.DataFrame(take_turns(arms, run, args.turns, warms_up=True))
    if args.out:
        write_rows(frame, args.out, {"asked": asked, "backend": asdict(info)})
    print(f"{info.model}, {info.dtype}, {info.num_threads} engine thread(s), {len(prompts)} prompts\n")
    print(table(frame, arms))
    backend.close()


if __name__ == "__main__":
    main()
