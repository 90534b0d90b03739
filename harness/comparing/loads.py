"""Which loads a comparison has, which arms it measures under each, and the requests of every block.

A strategy is judged under a closed loop with more users than slots, where its capacity shows, and under an
open loop at one rate for all arms, where waiting shows. The rate is a share of what the reference arm can do,
which is measured once and noted, so that the schedules can be had again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters.base import ConfigError
from harness.comparing.compare_runs import Ledger, LoadPlan, plan_digest
from harness.plan.load import parse_loads, rate_of_share
from harness.plan.planner import plan
from harness.replay.arm_file import Arm
from harness.results.output_dir import whole_file
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

    The arm that ratios refer to is always among them.
    """

    def is_of_load(arm: Arm) -> bool:
        if share is None:
            return "BATCH_WAIT_MS" not in arm.settings
        # A static client that waits until arrivals fill its chunk measures the rate, not the server.
        return arm.variant != "static" and (pad_was_given or arm.settings.get("PAD_FINISHED") != "0")

    return [arm for arm in arms if arm.name == reference or is_of_load(arm)]


def known_capacity(path: Path, measure: Callable[[], float], *, resume: bool) -> float:
    """What `path` notes of an earlier call of the same plan, else what is measured now."""
    if resume and path.is_file():
        try:
            noted = float(path.read_text())
        except ValueError:
            noted = 0.0
        if 0 < noted < math.inf:
            return noted  # else the note is damaged, and the plan another one
    found = measure()
    with whole_file(path) as file:
        file.write(repr(found).encode())
    return found


def plan_load(
    share: float | None,
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
    if share is not None:
        assert settings.capacity is not None, "measured before"
        of_closed: dict[str, None] = {"think_ms": None, "think": None, "ramp_s": None}
        settings = settings.model_copy(update={"rate": rate_of_share(share, settings.capacity), **of_closed})
    has_draws = settings.draws == "new" and settings.trace is None  # a trace has the requests that it has
    draws = list(range(num_blocks)) if has_draws else [None]
    planned = [plan(settings, allow_changed_corpus=allow_changed_corpus, draw=draw) for draw in draws]
    corpus, schedules = planned[0][0], [schedule for _, schedule in planned]
    if not has_draws:
        schedules *= num_blocks
    ledger = Ledger(folder, plan_digest(arms, settings, corpus, schedules[0]), resume=resume)
    return LoadPlan(arms, settings, corpus, schedules, ledger)
