"""How many blocks and requests a comparison has that nobody gave a number: fixed before its first run.

All arms of a block answer the same requests, since a percentile of the first thirty requests and one of sixty
are not two values of one figure. So the slowest arm sets how many there are. Each kind of arm is tried out on
answers as unequal as the corpus's. An open loop takes its time from its rate, whatever its arms do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from harness.comparing.intervals import FEWEST_BLOCKS
from harness.comparing.loads import LEFT_OUT, fewer_arms, load_settings
from harness.plan.corpus import Corpus
from harness.plan.load import load_words
from harness.plan.run_size import Trial, enough_requests, mean_budget
from harness.replay.arm_file import Arm
from harness.results.output_dir import whole_file
from harness.results.stats import MIN_SAMPLES
from harness.results.table import counted, duration_text
from harness.settings import HarnessSettings

DEFAULT_BLOCKS = 4
"""Their intervals are less than half as wide as those of the fewest that give any. A fifth block brings
nothing more: from there on the outermost blocks are left out."""
WHOLE_S, QUICK_S = 540.0, 165.0
"""What the command is planned to take, trials included, to end within ten minutes, or three: virtual machines
slow down by a tenth meanwhile."""
STRETCH = 1.25
"""Intervals are worth so much more time, where nothing else is left to be taken away."""
LONG_S = 12.0
"""What the fastest arm measures in all blocks together: a tenth more than a run that counts as short."""
TAIL_REQUESTS, TAIL_SHARE = 6, 0.5
"""Of an open loop, what is still to be answered after the last arrival: in gaps between arrivals, and at
least this share of what one answer for each user takes, since a batch that has begun runs to its end."""
JUDGED_S = 0.5
"""What it takes to write and judge a run."""
QUICK_ARRIVALS = 10
"""Of an open loop, at least; of a closed one each user asks once."""
TRIAL_TOKENS = 16
_ALIKE = frozenset({"PAD_FINISHED", "BATCH_WAIT_MS"})
"""Arms that differ in these alone are tried out once; the wait does not matter where a queue never ends."""


@dataclass(frozen=True, slots=True)
class SizedLoad:
    """One load to be measured; `rate` None for a closed loop."""

    arms: Sequence[Arm]
    rate: float | None
    missing: Sequence[str] = ()
    """Arms that are left out for time."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is noted beside the results, so that `--resume` measures the same."""

    capacity: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    num_blocks: PositiveInt
    requests: list[PositiveInt]
    """Of each load, in one block."""
    left_out: NonNegativeInt
    """Steps of `fewer_arms`."""
    block_s: float | None
    """What a block is expected to take; None where nobody tried the arms out."""


_SIZE = TypeAdapter(Size)


def kind_of(arm: Arm) -> str:
    """Arms of one kind have one trial."""
    own = sorted(item for item in arm.settings.items() if item[0] not in _ALIKE)
    return json.dumps([arm.variant, own])


def noted(path: Path, find: Callable[[], Size], *, resume: bool) -> Size:
    """What `path` notes of an earlier call of the same plan, else what is found now."""
    if resume and path.is_file():
        with suppress(ValidationError):  # a damaged note: the plan is another one then
            return _SIZE.validate_json(path.read_bytes())
    found = find()
    with whole_file(path) as file:
        file.write(json.dumps(asdict(found)).encode())
    return found


def find_size(
    settings: HarnessSettings,
    loads: Sequence[tuple[float | None, Sequence[Arm]]],
    reference: str,
    corpus: Corpus,
    try_out: Callable[[Arm, Sequence[int]], Trial],
    *,
    is_given: bool,
    asked_blocks: int | None,
    may_leave_out: bool,
    started_s: float,
) -> Size:
    """Of `loads`, each with its share of the capacity and its arms.

    Where the number of requests `is_given`, only a capacity that is missing is measured. `may_leave_out`:
    arms need not all be there. `started_s` is when the command began, on `perf_counter`.
    """
    told = next(arm for _, arms in loads for arm in arms if arm.name == reference)
    needs_capacity = settings.capacity is None and any(share is not None for share, _ in loads)
    if is_given:
        capacity = try_out(told, ()).capacity if needs_capacity else settings.capacity
        usual = 1 if settings.quick else DEFAULT_BLOCKS
        return Size(capacity, asked_blocks or usual, [settings.requests] * len(loads), 0, None)
    # A first look has no time to try out more: it takes all arms to be as slow as the reference.
    is_first_look = settings.quick and may_leave_out
    budgets = [] if is_first_look else trial_budgets(corpus, settings.concurrency)
    trials = {kind_of(told): try_out(told, budgets)}
    for arm in (arm for _, arms in loads for arm in arms):
        if kind_of(arm) not in trials:
            trials[kind_of(arm)] = trials[kind_of(told)] if is_first_look else try_out(arm, budgets)
    capacity = trials[kind_of(told)].capacity if needs_capacity else settings.capacity
    settings = settings.model_copy(update={"capacity": capacity})
    steps = LEFT_OUT + 1 if may_leave_out else 1

    def costs(num_blocks: int) -> Costs:
        found = []
        for step in range(steps):
            left = [(share, fewer_arms(arms, share, step, reference)) for share, arms in loads]
            found.append(_costs(left, trials, mean_budget(corpus), settings, num_blocks))
        return found

    return choose_size(costs, settings, asked_blocks=asked_blocks, spent_s=perf_counter() - started_s)


def choose_size(
    costs: Callable[[int], Costs], settings: HarnessSettings, *, asked_blocks: int | None, spent_s: float
) -> Size:
    """The most requests with which the usual number of blocks fits into the time that is left. Where that is
    not even the least that counts, arms are left out, then blocks down to `FEWEST_BLOCKS`, then it takes
    longer, then there is one block. `costs` by the number of blocks."""
    whole_s, usual = (QUICK_S, 1) if settings.quick else (WHOLE_S, DEFAULT_BLOCKS)
    left_s = whole_s - spent_s
    fewest = min(usual, FEWEST_BLOCKS)
    for num_blocks in range(usual, fewest - 1, -1):
        of_arms = costs(num_blocks)
        left_out, requests = _first_that_fits(of_arms, left_s / num_blocks, is_quick=settings.quick)
        if requests:
            break
    if requests is None and asked_blocks is None:
        fewest_s = fewest * sum(cost.seconds(cost.least) for cost in of_arms[-1])
        if fewest_s > STRETCH * left_s:
            num_blocks, of_arms = 1, costs(FEWEST_BLOCKS)
            left_out, requests = _first_that_fits(of_arms, left_s, is_quick=settings.quick)
    requests = requests or [cost.least for cost in of_arms[left_out]]
    block_s = sum(cost.seconds(num) for cost, num in zip(of_arms[left_out], requests, strict=True))
    return Size(settings.capacity, asked_blocks or num_blocks, requests, left_out, block_s)


def _first_that_fits(costs: Costs, block_s: float, *, is_quick: bool) -> tuple[int, list[int] | None]:
    """How many steps leave arms out until the least that counts fits, and the requests then; None where even
    all of them do not help."""
    for left_out, of_loads in enumerate(costs):
        requests = _most_requests(of_loads, block_s)
        if requests is None:
            continue
        # A p95 in each block is worth more than a second setting of some arms.
        if left_out or is_quick or len(costs) == 1 or min(requests) >= MIN_SAMPLES[95]:
            return left_out, requests
    return len(costs) - 1, None


@dataclass(frozen=True, slots=True)
class _Cost:
    """One block of one load: seconds of its runs without a request, and of each request in all of them."""

    fixed_s: float
    request_s: float
    least: int
    wanted: int

    def seconds(self, num_requests: int) -> float:
        return self.fixed_s + num_requests * self.request_s


Costs = Sequence[Sequence[_Cost]]
"""Of all loads, for each number of steps that leave arms out."""


def _costs(
    loads: Sequence[tuple[float | None, Sequence[Arm]]],
    trials: Mapping[str, Trial],
    mean_tokens: float,
    settings: HarnessSettings,
    num_blocks: int,
) -> list[_Cost]:
    """Of each load. An arm's service is started for the first of its loads."""
    costs: list[_Cost] = []
    started: set[str] = set()
    for share, arms in loads:
        tried = [trials[kind_of(arm)] for arm in arms]
        new = [trials[kind_of(arm)].start_s for arm in arms if str(arm.name) not in started]
        started |= {str(arm.name) for arm in arms}
        rate = load_settings(share, settings).rate
        costs.append(_cost(tried, sum(new), rate, mean_tokens, settings, num_blocks))
    return costs


def _cost(
    tried: Sequence[Trial],
    start_s: float,
    rate: float | None,
    mean_tokens: float,
    settings: HarnessSettings,
    num_blocks: int,
) -> _Cost:
    """Of one load whose arms did `tried`; `rate` None for a closed loop."""
    fixed_s = start_s + sum(trial.warm_up_s + JUDGED_S for trial in tried)
    users = settings.concurrency
    if rate is None:
        think_s = (settings.think_ms or 0.0) / 1e3 / users
        each_s = [max(mean_tokens / trial.tokens_per_s, think_s) for trial in tried]
        request_s, fastest_s = sum(each_s), min(each_s)
        enough = min(enough_requests(users), LONG_S / fastest_s)
        least = users if settings.quick else 2 * users
    else:
        rounds_s = [users * mean_tokens / trial.tokens_per_s for trial in tried]
        fixed_s += sum(max(TAIL_REQUESTS / rate, TAIL_SHARE * round_s) for round_s in rounds_s)
        request_s = len(tried) / rate
        enough = LONG_S * rate
        least = QUICK_ARRIVALS if settings.quick else math.ceil(MIN_SAMPLES[95] / num_blocks)
    if not settings.quick:
        least = max(least, math.ceil(enough / num_blocks))
    return _Cost(fixed_s, request_s, least, max(settings.requests, least))


def _most_requests(costs: Sequence[_Cost], block_s: float) -> list[int] | None:
    """Of each load, as far on the way from its least number to the wanted one as all of them can go."""
    spare_s = block_s - sum(cost.seconds(cost.least) for cost in costs)
    if spare_s < 0:
        return None
    more_s = sum((cost.wanted - cost.least) * cost.request_s for cost in costs)
    part = min(1.0, spare_s / more_s) if more_s else 1.0
    return [cost.least + math.floor(part * (cost.wanted - cost.least)) for cost in costs]


def trial_budgets(corpus: Corpus, num_requests: int) -> list[int]:
    """Tokens of answers that are short, and as unequal as the first ones of the corpus."""
    budgets = [prompt.max_tokens for prompt in corpus.prompts[:num_requests]]
    scale = TRIAL_TOKENS * len(budgets) / sum(budgets)
    return [max(2, round(budget * scale)) for budget in budgets]


def size_text(
    size: Size, loads: Sequence[SizedLoad], reference: str, settings: HarnessSettings, num_blocks: int
) -> list[str]:
    """The plan, before it starts: blocks, requests, arms, minutes, and what so few requests cannot tell."""
    least = MIN_SAMPLES[95]
    num_runs = sum(len(load.arms) for load in loads)
    takes = f", about {duration_text(num_blocks * size.block_s)}" if size.block_s else ""
    lines = [f"plan: {counted(num_blocks, 'block')} of {num_runs} runs{takes}"]
    for load, num in zip(loads, size.requests, strict=True):
        words = load_words(load.rate, settings.concurrency)
        lines.append(f"  {words}: {num} requests a block; {', '.join(str(arm.name) for arm in load.arms)}")
        if load.missing:
            lines.append(
                f"    left out for time: {', '.join(load.missing)} (--variants says which arms there are)"
            )
    if size.capacity and any(load.rate is not None for load in loads):
        again = f"CAPACITY={size.capacity:g} gives these rates again"
        lines.append(f"  capacity of {reference}: {size.capacity:g} requests/s ({again})")
    if min(size.requests) < least:
        lines.append(f"  under {least} requests a block there is no ratio of p95 (REQUESTS={least} gives it)")
    if size.block_s and num_blocks < FEWEST_BLOCKS and not settings.quick:
        more = duration_text(FEWEST_BLOCKS * size.block_s)
        lines.append(f"  intervals need {FEWEST_BLOCKS} blocks: --blocks {FEWEST_BLOCKS} takes about {more}")
    return lines
