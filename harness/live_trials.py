"""Trials of the verdicts on live runs without a difference: `python -m harness.live_trials --url URL`.

What enters is a running service (its null backend will do) and a number of trials; what leaves is how often
two arms that are the same were called different. Each trial measures both in interleaved blocks with a
schedule of its own, as `lab compare` does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from harness.arm_file import Arm
from harness.arms import arm_order
from harness.headline import contrasts
from harness.measure import measure
from harness.plan import plan
from harness.progress import PlainReporter
from harness.settings import HarnessSettings


def main() -> None:
    parser = argparse.ArgumentParser(description="A/A trials against a running server")
    parser.add_argument("--url", required=True)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    args = parser.parse_args()
    words: Counter[str] = Counter()
    num_different = 0
    arms = [Arm(None, "first"), Arm(None, "second")]
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(args.trials):
            asked: dict[str, Any] = {
                "url": args.url,
                "requests": args.requests,
                "seed": trial,
                "out": Path(folder),
                "floor": False,
            }
            settings = HarnessSettings(**asked)
            corpus, schedule = plan(settings, allow_changed_corpus=False)
            frames: list[pd.DataFrame] = []
            for block in range(args.blocks):
                for arm in arm_order(arms, block, settings.seed):
                    made = measure(arm, settings, corpus, schedule, PlainReporter(), [block])
                    frames.append(made.rows)
            found = contrasts(pd.concat(frames), ["first", "second"], "first", is_open=False)
            told = [contrast.judgement.word for contrast in found if contrast.judgement]
            words.update(told)
            num_different += any(word in ("better", "worse") for word in told)
    print(f"{num_different} of {args.trials} trials called any of the metrics different")
    print(", ".join(f"{count} x {word}" for word, count in words.most_common()))


if __name__ == "__main__":
    main()
