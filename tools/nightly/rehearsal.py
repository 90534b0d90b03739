"""Runs the workflows on this machine with `act`: their own `run:` steps, in order, at a load of seconds.

`python -m tools.nightly.rehearsal --times 10` is the proof that the nightly turns red on a step that is 20%
slower and not on the same commit: each time in a clone that is thrown away. Stand-ins are actions (checkout,
Python, cache, upload) and the program gh, which notes its words; nothing outside the machine is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.plan.corpus import REPOSITORY

STEP = "self._step_s = options.null_step_ms / 1000\n"
LOAD = {
    "BENCH_VARIANTS": "continuous",
    "BENCH_BACKENDS": "null",
    "BACKEND": "null",
    "NULL_STEP_MS": "5",
    "REQUESTS": "32",
    "CONCURRENCY": "16",
    "FLOOR": "0",
    "BUDGET_S": "240",
}
_STAND_IN = """name: stand-in
inputs:
  name: {default: ""}
  path: {default: ""}
runs:
  using: composite
  steps:
    - shell: bash
      run: %s
      env: {NAME: "${{ inputs.name }}", WHAT: "${{ inputs.path }}"}
"""
_ACTIONS = {
    "checkout": "true",
    "cache": "true",
    # The environment of this machine stands for the packages that make would install.
    "setup-python": "mkdir -p .venv; "
    'for f in bin lib pyvenv.cfg; do ln -sfn "$LAB_VENV/$f" .venv/$f; done; '
    "for s in base torch llama smollm2; do touch .venv/.lab-$s; done; touch .venv/.dev .venv/.ops; "
    'echo "PYTHONPATH=$PWD" >> "$GITHUB_ENV"',
    "upload-artifact": 'mkdir -p "$LAB_ARTIFACTS/$NAME"; '
    '[ ! -d "$WHAT" ] || cp -r "$WHAT." "$LAB_ARTIFACTS/$NAME"',
}
_GH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$LAB_ARTIFACTS/gh.log"
case "$*" in
"run download "*) mkdir -p "$7" && cp -r "$LAB_ARTIFACTS/$5/." "$7" ;;
"issue list "*) echo '[]' ;;
"api repos"*comments*) echo '[]' ;;
"api "*/commits/*/pulls) echo '[]' ;;  # as for the head of a fork
"api "*/pulls*"head=$HEAD_BRANCH "*) printf '[{"number": 7, "head": {"sha": "%s"}}]' "$HEAD_SHA" ;;
esac
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """A clone with an origin of its own, and what its workflows leave behind."""

    root: Path

    @property
    def clone(self) -> Path:
        return self.root / "clone"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    def git(self, *words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", f"core.hooksPath={os.devnull}")
        made = subprocess.run(
            ["git", "-C", str(self.clone), *who, *words], check=True, capture_output=True, text=True
        )
        return made.stdout.strip()

    def commit(self, slowdown: float) -> None:
        """A commit on top, whose null backend takes that much longer a step (0: the same code)."""
        path = self.clone / "adapters" / "null_backend.py"
        text = path.read_text()
        assert STEP in text
        if slowdown:
            path.write_text(text.replace(STEP, STEP.replace("/ 1000", f"* {1 + slowdown:g} / 1000")))
        self.git("commit", "--quiet", "--allow-empty", "-am", f"slowdown {slowdown:g}")

    def run(
        self, event: str, workflow: str, facts: object = None, env: Mapping[str, str] = {}, *words: str
    ) -> subprocess.CompletedProcess[str]:
        payload = self.root / "event.json"
        payload.write_text(json.dumps(facts or {}))
        kept = {
            **(LOAD if workflow.startswith("bench") else {}),
            "LAB_VENV": sys.prefix,
            "LAB_ARTIFACTS": str(self.artifacts),
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}:{REPOSITORY / '.uv' / 'bin'}",
            "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache" / "uv")),
            **env,
        }
        act = [str(Path(sys.executable).with_name("act")), event, "-W", f".github/workflows/{workflow}"]
        act += ["-e", str(payload), "-P", "ubuntu-latest=-self-hosted", "--action-offline-mode"]
        act += [word for name, value in kept.items() for word in ("--env", f"{name}={value}")]
        act += [word for pin in self._pins() for word in ("--local-repository", pin)]
        own = {"XDG_CONFIG_HOME": str(self.root / "config"), "XDG_CACHE_HOME": str(self.root / "cache")}
        # A make that started this would hand its own variables to the makes of the steps.
        around = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(
            [*act, *words],
            cwd=self.clone,
            env={**around, **own},
            capture_output=True,
            text=True,
            check=False,
        )

    def _pins(self) -> list[str]:
        """ACTION@COMMIT=FOLDER of every action that a workflow uses."""
        used: set[str] = set()
        for path in (self.clone / ".github" / "workflows").glob("*.yml"):
            lines = path.read_text().splitlines()
            used |= {line.split()[2] for line in lines if line.strip().startswith("- uses: ")}
        return [
            f"{use}={self.root / 'actions' / use.partition('@')[0].rpartition('/')[2]}"
            for use in sorted(used)
        ]


def make_stage(root: Path, source: Path = REPOSITORY) -> Stage:
    stage = Stage(root)
    subprocess.run(["git", "clone", "--quiet", "--bare", str(source), str(root / "origin.git")], check=True)
    subprocess.run(["git", "clone", "--quiet", str(root / "origin.git"), str(stage.clone)], check=True)
    for name, words in _ACTIONS.items():
        (root / "actions" / name).mkdir(parents=True)
        (root / "actions" / name / "action.yml").write_text(_STAND_IN % json.dumps(words))
    gh = root / "bin" / "gh"
    gh.parent.mkdir()
    gh.write_text(_GH)
    gh.chmod(gh.stat().st_mode | stat.S_IXUSR)
    (root / "config" / "act").mkdir(parents=True)
    (root / "config" / "act" / "actrc").touch()  # without one act asks which images to take
    stage.artifacts.mkdir()
    return stage


def verdict_of(stage: Stage, name: str = "nightly") -> str:
    """The word of each pair, the worst last; `none` where nothing was measured."""
    path = stage.artifacts / name / "verdict.json"
    if not path.is_file():
        return "none"
    return ", ".join(pair["word"] for pair in json.loads(path.read_text())["pairs"])


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every slowdown turned the nightly red and no equal commit did."""
    parser = argparse.ArgumentParser(prog="python -m tools.nightly.rehearsal", description=__doc__)
    parser.add_argument("--times", type=int, default=10, metavar="N", help="of each (default 10)")
    parser.add_argument("--slowdown", type=float, default=0.2, metavar="SHARE", help="default 0.2")
    args = parser.parse_args(argv)
    num_wrong = num_passed = 0
    started_s = time.monotonic()
    for number in range(args.times):
        for slowdown in (args.slowdown, 0.0):
            root = Path(tempfile.mkdtemp(prefix="lab-rehearsal-"))
            stage = make_stage(root)
            stage.commit(slowdown)
            # What the other jobs do with a verdict, tests/ops shows once.
            made = stage.run("schedule", "bench-nightly.yml", None, {}, "-j", "measure")
            is_right = bool(made.returncode) == bool(slowdown) and "FAILED" not in verdict_of(stage)
            num_wrong += not is_right
            num_passed += not slowdown and verdict_of(stage) == "pass"
            colour = "red" if made.returncode else "not red"
            told = "as it should" if is_right else f"WRONG, see {root}"
            took_s = time.monotonic() - started_s
            what = f"{slowdown:.0%} slower: {colour} ({verdict_of(stage)})"
            print(f"{took_s:4.0f} s, {number + 1}: {what}, {told}", flush=True)
            if is_right:
                shutil.rmtree(root)
            else:
                (root / "log.txt").write_text(made.stdout + made.stderr)
    print(f"{num_wrong} of {2 * args.times} wrong; {num_passed} of {args.times} equal commits passed")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
