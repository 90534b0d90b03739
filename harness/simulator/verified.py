"""Errors of simulated figures against measured ones: which are too large, and where nobody can tell.

Where a run was repeated, the machine's own drift is known. Nobody can tell whether the model or the machine
is wrong where the repeats differ by more than the simulation is off from their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from harness.results.table import MISSING, render_table
from harness.simulator.calibration import Verified
from harness.simulator.replaying import StepReplay


@dataclass(frozen=True, slots=True)
class Checked:
    """One figure of one run; `allowed` is the largest relative error that counts as right."""

    name: str
    measured: float | None
    simulated: float | None
    allowed: float
    repeats: tuple[float, ...] = ()
    """Of all runs of the same requests and settings, this one among them."""

    @property
    def error(self) -> float | None:
        """None where a figure is missing, or where 0 was measured and is not simulated."""
        if self.measured is None or self.simulated is None:
            return None
        return _relative(self.simulated, self.measured)

    @property
    def is_beyond(self) -> bool:
        """A percentile that too few requests stand behind is not."""
        if self.measured is None:
            return False
        return self.error is None or abs(self.error) > self.allowed

    @property
    def drift(self) -> float | None:
        """By how much the repeats differ, against their mean."""
        if len(self.repeats) < 2 or not (mean := fmean(self.repeats)):
            return None
        return (max(self.repeats) - min(self.repeats)) / mean

    @property
    def error_of_mean(self) -> float | None:
        if self.simulated is None or not self.repeats:
            return None
        return _relative(self.simulated, fmean(self.repeats))

    @property
    def cannot_tell(self) -> bool:
        if not self.is_beyond or self.drift is None or self.error_of_mean is None:
            return False
        return abs(self.error_of_mean) <= self.drift

    @property
    def is_off(self) -> bool:
        return self.is_beyond and not self.cannot_tell

    def text(self) -> str:
        if self.measured is None or self.simulated is None:
            return MISSING
        said = f"{self.error:+.1%}" if self.error is not None else "?"
        mark = " ?" if self.cannot_tell else " !" if self.is_off else ""
        return f"{self.measured:.4g} -> {self.simulated:.4g} ({said}){mark}"

    def text_of_repeats(self) -> str:
        if self.drift is None or self.error_of_mean is None:
            return MISSING
        return f"{self.error_of_mean:+.1%} (repeats differ by {self.drift:.1%})"


@dataclass(frozen=True, slots=True)
class VerifiedRun:
    name: str
    load: str
    others: float | None
    """Share of the CPU that other processes used while it was measured."""
    checks: tuple[Checked, ...]
    schedule: str = ""
    """Digest of what was asked for."""
    replay: StepReplay | None = None
    """Of its step log through the scheduler; None where that cannot be told."""

    @property
    def is_off(self) -> bool:
        """A figure is, or the scheduler plans other steps than the log has."""
        return any(check.is_off for check in self.checks) or (self.replay is not None and self.replay.is_off)

    @property
    def what(self) -> tuple[str, str]:
        """Equal for repeats of one run."""
        return self.name, self.schedule


def median_errors(runs: Sequence[VerifiedRun], digest: str = "") -> Verified:
    """Of each figure that any run has, as a calibration of this digest keeps it."""
    errors: dict[str, list[float]] = {}
    for run in runs:
        for check in run.checks:
            if check.error is not None:
                errors.setdefault(check.name, []).append(abs(check.error))
    middle = {name: median(found) for name, found in errors.items()}
    return Verified(num_runs=len(runs), digest=digest, median_errors=middle)


def render_verified(runs: Sequence[VerifiedRun]) -> str:
    names = [check.name for check in runs[0].checks]
    lines = [
        [run.name, run.load, _share(run.others), *(c.text() for c in run.checks), _steps(run.replay)]
        for run in runs
    ]
    parts = [render_table(["arm", "load", "others' CPU", *names, "steps replayed"], lines)]
    if repeated := {run.what: run for run in runs if run.checks[0].drift is not None}.values():
        nums = [str(len(run.checks[0].repeats)) for run in repeated]
        lines = [
            [run.name, run.load, num, *(c.text_of_repeats() for c in run.checks)]
            for run, num in zip(repeated, nums, strict=True)
        ]
        parts += ["Repeated runs, against their mean:", render_table(["arm", "load", "runs", *names], lines)]
    middle = median_errors(runs).median_errors
    each = zip(*(run.checks for run in runs), strict=True)
    summary = [_summary(name, checks, middle.get(name)) for name, checks in zip(names, each, strict=True)]
    return "\n\n".join([*parts, "\n".join(summary + _order(runs))])


def _summary(name: str, checks: Sequence[Checked], middle: float | None) -> str:
    known = [check for check in checks if check.measured is not None]
    if not known or middle is None:
        return f"{name}: too few requests in every run"
    num_off, allowed = sum(check.is_off for check in known), 100 * known[0].allowed
    told = (
        f"{name}: median error {middle:.1%}, {num_off} of {len(known)} runs off by more than {allowed:g}% (!)"
    )
    num_unknown = sum(check.cannot_tell for check in known)
    return f"{told}, {num_unknown} more where the machine drifts by more (?)" if num_unknown else told


def _order(runs: Sequence[VerifiedRun]) -> list[str]:
    """Whether arms that were asked for the same stand in the order in which they were measured."""
    sets: dict[str, dict[str, Checked]] = {}
    for run in runs:
        sets.setdefault(run.schedule, {})[run.name] = run.checks[0]
    num_pairs = num_right = 0
    for arms in sets.values():
        for one, other in combinations(arms.values(), 2):
            low, high = sorted([one, other], key=lambda check: fmean(check.repeats))
            if fmean(high.repeats) <= fmean(low.repeats) * (1 + low.allowed):
                continue  # equal, as far as this check goes
            num_pairs += 1
            num_right += (high.simulated or 0.0) > (low.simulated or 0.0)
    if not num_pairs:
        return []
    of_pairs = f"{num_right} of {num_pairs} pairs of arms with the same requests and other figures"
    return [f"{runs[0].checks[0].name}: {of_pairs} stand in the order in which they were measured"]


def _share(others: float | None) -> str:
    return MISSING if others is None else f"{others:.0%}"


def _steps(replay: StepReplay | None) -> str:
    return MISSING if replay is None else replay.text()


def _relative(said: float, of: float) -> float | None:
    if said == of:
        return 0.0
    return said / of - 1 if of else None
