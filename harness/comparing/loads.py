"""Which loads a comparison has, which arms it measures under each, and the requests of every block.

A strategy is judged under a closed loop with more users than slots, where its capacity shows, and under an
open loop at one rate for all arms, where waiting shows. The rate is a share of what the reference arm can do,
which is measured once and noted, so that the schedules can be had again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapters.base import ConfigError
from harness.comparing.compare_runs import Ledger, LoadPlan, plan_digest
from harness.plan.load import parse_loads, rate_of_share
from harness.plan.planner import plan
from harness.replay.arm_file import Arm
from harness.settings import HarnessSettings

DEFAULT_VARIANTS = ("baseline", "static", "dynamic", "continuous")
NO_WAIT = "dynamic@BATCH_WAIT_MS=0"
"""Beside the default wait where arrivals are spread; a queue that is never empty fills a batch at once."""
DEFAULT_LOADS = "closed 0.75"
DEFAULT_USERS = 24
"""Of a closed loop: half as many again as the service has slots by default."""
QUICK_REQUESTS = 48


def find_loads(settings: HarnessSettings) -> list[float | None]:
    """None for the load that the settings name themselves, else a share of the capacity.

    Raises:
        ConfigError: LOADS contradict them.
    """
    names_one = [n for n in ("rate", "arrivals", "trace") if getattr(settings, n) is not None]
    if settings.loads is None:
        return [None] if names_one else parse_loads(DEFAULT_LOADS)
    if names_one:
        raise ConfigError(f"LOADS and {names_one[0].upper()} both say which load to measure: leave one out")
    return parse_loads(settings.loads)


def with_defaults(settings: HarnessSettings) -> HarnessSettings:
    """More users than slots, and few requests where it has to be quick, unless numbers were given."""
    given = settings.model_fields_set
    chosen: dict[str, int] = {}
    if "concurrency" not in given:
        chosen["concurrency"] = DEFAULT_USERS
    if settings.quick and "requests" not in given:
        chosen["requests"] = QUICK_REQUESTS
    return settings.model_copy(update=chosen)


def default_arms(
    arms: Sequence[Arm], share: float | None, *, reference: str, pad_was_given: bool
) -> list[Arm]:
    """Those of the default arms that a load is about, so that all loads together take minutes.

    The arm that ratios refer to is always among them. A static client's wait until arrivals fill its chunk is
    what the strategy costs where arrivals are spread, and counts.
    """
    if share is None:
        return [arm for arm in arms if arm.name == reference or "BATCH_WAIT_MS" not in arm.settings]
    return list(arms) if pad_was_given else without_unpadded(arms, reference)


def without_unpadded(arms: Sequence[Arm], reference: str) -> list[Arm]:
    """PAD_FINISHED=0 is the second setting of an arm."""
    return [arm for arm in arms if arm.name == reference or arm.settings.get("PAD_FINISHED") != "0"]


LEFT_OUT = 3
"""So many steps leave arms out where time is short; intervals are worth more than any of those arms."""


def fewer_arms(arms: Sequence[Arm], share: float | None, left_out: int, reference: str) -> list[Arm]:
    """The default arms after `left_out` steps: 1 takes PAD_FINISHED=0 away, 2 the second wait in open loops,
    3 `static` in open loops, whose client's wait for a full chunk is known beforehand."""
    if left_out >= 1:
        arms = without_unpadded(arms, reference)

    def is_kept(arm: Arm) -> bool:
        if share is None or arm.name == reference:
            return True
        return not (
            (left_out >= 2 and "BATCH_WAIT_MS" in arm.settings) or (left_out >= 3 and arm.variant == "static")
        )

    return [arm for arm in arms if is_kept(arm)]


def load_settings(share: float | None, settings: HarnessSettings) -> HarnessSettings:
    """Those of one load: with its rate, if it is a share of the capacity."""
    if share is None:
        return settings
    assert settings.capacity is not None, "measured before"
    of_closed: dict[str, None] = {"think_ms": None, "think": None, "ramp_s": None}
    return settings.model_copy(update={"rate": rate_of_share(share, settings.capacity), **of_closed})


def plan_load(
    arms: Sequence[Arm],
    settings: HarnessSettings,
    num_blocks: int,
    folder: Path,
    *,
    resume: bool,
    allow_changed_corpus: bool,
) -> LoadPlan:
    """
    Raises:
        ConfigError: the settings make no plan.
    """
    has_draws = settings.draws == "new" and settings.trace is None  # a trace has the requests that it has
    draws = list(range(num_blocks)) if has_draws else [None]
    planned = [plan(settings, allow_changed_corpus=allow_changed_corpus, draw=draw) for draw in draws]
    corpus = planned[0][0]
    schedules = [replace(schedule, num_blocks=num_blocks) for _, schedule in planned]
    if not has_draws:
        schedules *= num_blocks
    ledger = Ledger(folder, plan_digest(arms, settings, corpus, schedules[0]), resume=resume)
    return LoadPlan(arms, settings, corpus, schedules, ledger)
