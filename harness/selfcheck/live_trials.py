"""How often two arms that are the same are called different: `python -m harness.selfcheck.live_trials`.

Each trial measures both against one running service (its null backend will do), in interleaved blocks with a
schedule of its own, as `lab compare` does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from harness.comparing.arms import arm_order
from harness.comparing.contrasts import contrasts
from harness.measure import measure
from harness.plan.planner import plan
from harness.replay.arm_file import Arm
from harness.replay.progress import PlainReporter
from harness.settings import HarnessSettings


def main() -> None:
    parser = argparse.ArgumentParser(description="A/A trials against a running server")
    parser.add_argument("--url", required=True)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    args = parser.parse_args()
    words: Counter[str] = Counter()
    num_different = 0
    arms = [Arm(None, "first"), Arm(None, "second")]
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(args.first_seed, args.first_seed + args.trials):
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
            told = [contrast.verdict.word for contrast in found if contrast.verdict]
            words.update(told)
            different = [c for c in found if c.verdict and c.verdict.word in ("better", "worse")]
            num_different += bool(different)
            for contrast in different:
                print(f"seed {trial}: {contrast.figure.label} {contrast.text()}", flush=True)
    print(f"{num_different} of {args.trials} trials called any of the metrics different")
    print(", ".join(f"{count} x {word}" for word, count in words.most_common()))


if __name__ == "__main__":
    main()
