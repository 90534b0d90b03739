"""`lab simulate`: a fleet on a virtual clock, with the lab's own engine, strategies and load.

Figures are predictions from a calibration and say so wherever they stand. Exit status: 0, or 2 when nothing
could be simulated; with `--verify` 1 when a figure of a run is further off than is allowed, or the scheduler
plans other steps than the run's log has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from adapters.base import ConfigError
from harness.commands.fleet_options import (
    OF_REAL_RUNS,
    add_fleet_options,
    add_price_option,
    fleet_options,
    print_origin,
    read_source,
)
from harness.commands.options import add_corpus_option, add_slo_option, without_steps
from harness.comparing.arms import is_of_the_run, parse_arm, split_names
from harness.plan.load import load_words
from harness.results.cost import Price, read_price
from harness.results.slo import Slo
from harness.results.table import MISSING, render_table, share
from harness.settings import HarnessSettings, add_setting_options, read_settings
from harness.simulator.brief import refuse_limits
from harness.simulator.calibration import Calibration, write_calibration
from harness.simulator.cells import FIGURES, Cell, Outcome, play_all, set_of
from harness.simulator.routers import ROUTERS
from harness.simulator.simulation import read_arm
from harness.simulator.verified import median_errors, render_verified
from harness.simulator.verify import verify_all

PlayAll = Callable[[Iterable[Cell], int], Iterator[Outcome]]

_OF_LOAD = ("rate", "concurrency")
_CAN_BE_SWEPT = "rate, concurrency, replicas, router or a setting of the service, in capitals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_setting_options(parser, leave_out=OF_REAL_RUNS)
    add_corpus_option(parser)
    add = parser.add_argument
    add(
        "--variants", nargs="+", metavar="NAME", default=["baseline", "static", "dynamic", "continuous"],
        help="strategies with settings, as in `lab compare`: continuous@ORDER=hrrn,MAX_BATCH=32",
    )  # fmt: skip
    add_fleet_options(parser)
    add(
        "--save-calibration", type=Path, metavar="PATH",
        help="write the calibration as JSON, with --verify the errors that it found as well",
    )  # fmt: skip
    add("--replicas", type=int, default=1, metavar="N", help="engines behind the router (default 1)")
    add("--router", choices=ROUTERS, default="round_robin", help="who gets a request (default round_robin)")
    add(
        "--sweep", type=_swept, action="append", default=[], metavar="NAME=VALUES",
        help=f"every arm with each of these values, rate=2,4,8 or MAX_BATCH=8,16: {_CAN_BE_SWEPT}; several "
        "times: all combinations",
    )  # fmt: skip
    add("--exact", action="store_true", help="every step an event of its own; slower, same rows")
    add(
        "--brief", action="store_true",
        help="for millions of requests: figures alone, no files of rows and steps",
    )  # fmt: skip
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="each arm with so many seeds, from SEED on (default 1)",
    )
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes that simulate arms, points and seeds (default 1)",
    )
    add_price_option(parser)
    add(
        "--verify",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="simulate these measured runs and say the errors",
    )
    add_slo_option(parser)


def run(args: argparse.Namespace, play_all: PlayAll = play_all) -> int:
    """`play_all` may play the cells elsewhere.

    Raises:
        LabError: a setting cannot work, or a file cannot be read.
    """
    calibration = read_source(args.calibrate, allow_busy=args.allow_busy)
    if args.verify:
        return _verify(without_steps(args.verify), calibration, args.save_calibration)
    if args.save_calibration:
        write_calibration(args.save_calibration, calibration)
    settings, slo = read_settings(args), Slo(tuple(args.slo))
    if args.brief:
        refuse_limits(slo)
    if min(args.seeds, args.jobs) < 1:
        raise ConfigError("--seeds and --jobs must be at least 1")
    _refuse_unheard_sweeps(args, settings)
    cells = [
        _cell(args, settings, point, text, seed, calibration)
        for point in map(dict[str, Any], product(*args.sweep))
        for text in split_names(args.variants)
        for seed in range(settings.seed, settings.seed + args.seeds)
    ]
    outcomes = list(play_all(cells, args.jobs))
    each_arm = [(cells[i].label, outcomes[i : i + args.seeds]) for i in range(0, len(outcomes), args.seeds)]
    print(_render(each_arm, args, settings, slo, calibration))
    most: dict[str, int] = {}
    for outcome in outcomes:
        most |= {name: max(value, most.get(name, 0)) for name, value in outcome.most.items()}
    print_origin(calibration, most)
    print("\n".join(outcome.told for outcome in outcomes))
    return 0


def _cell(
    args: argparse.Namespace,
    settings: HarnessSettings,
    point: dict[str, Any],
    text: str,
    seed: int,
    calibration: Calibration,
) -> Cell:
    name, own = parse_arm(text)
    own = {key: value for key, value in point.items() if key.isupper()} | own
    of_point = {key: point[key] for key in _OF_LOAD if key in point}
    at = settings.model_copy(update={"seed": seed, "api_key": None} | of_point)
    replicas, router = point.get("replicas", args.replicas), point.get("router", args.router)
    options = fleet_options(args, at, replicas=replicas, router=router, exact=args.exact, brief=args.brief)
    arm = read_arm(name, own, calibration)
    return Cell(
        label=" ".join([arm.variant, *(f"{key}={value}" for key, value in (point | own).items())]),
        settings=set_of(arm),
        at=at,
        options=options,
        calibration=calibration,
        limits=",".join(f"{limit.figure.key}={limit.bound!r}" for limit in args.slo),
        allow_changed_corpus=args.allow_changed_corpus,
    )


def _refuse_unheard_sweeps(args: argparse.Namespace, settings: HarnessSettings) -> None:
    """
    Raises:
        ConfigError: a name is swept twice, or nothing would come of it under this load or for an arm.
    """
    names = [swept[0][0] for swept in args.sweep]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{', '.join(sorted(twice))} is swept twice: give all values at once")
    if settings.trace and {"rate", "concurrency"} & set(names):
        raise ConfigError("a trace has neither a rate nor users to sweep")
    if "concurrency" in names and (settings.rate is not None or "rate" in names):
        raise ConfigError("an open loop has no users: sweep the rate or the concurrency")
    for text in split_names(args.variants):
        if own := sorted(parse_arm(text)[1].keys() & set(names)):
            raise ConfigError(
                f"{text} sets {', '.join(own)} itself, so that sweeping it would change nothing"
            )


def _swept(text: str) -> list[tuple[str, int | float | str]]:
    name, _, values = text.partition("=")
    read = {"rate": _above_zero(float), "concurrency": _above_zero(int), "replicas": _above_zero(int)}
    if name not in (*read, "router") and (not name.isupper() or is_of_the_run(name)):
        raise argparse.ArgumentTypeError(f"{name!r} cannot be swept: {_CAN_BE_SWEPT}")
    if name == "router" and (unknown := [router for router in values.split(",") if router not in ROUTERS]):
        raise argparse.ArgumentTypeError(f"there is no router {unknown[0]!r}; known: {', '.join(ROUTERS)}")
    try:
        return [(name, read.get(name, str)(value)) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"the values of {name} must be above 0, not {values!r}") from None


def _above_zero(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        if not 0 < (number := kind(text)) < float("inf"):
            raise ValueError
        return number

    return read


def _render(
    each_arm: list[tuple[str, list[Outcome]]],
    args: argparse.Namespace,
    settings: HarnessSettings,
    slo: Slo,
    calibration: Calibration,
) -> str:
    known = calibration.known_errors.median_errors if calibration.known_errors else {}
    price = read_price(args.price_per_hour_usd, None)
    names = [*(figure.label for figure in FIGURES), "mean batch", "dead rows"]
    headers = ["simulated arm", *(f"{name} ±{known[name]:.1%}" if name in known else name for name in names)]
    headers += ["failed", "replica hours"]
    headers += ["USD per million tokens"] if price.is_known else []
    headers += ["within SLO"] if slo else []
    lines = [[label, *_line(outcomes, price, slo)] for label, outcomes in each_arm]
    load = f"trace {settings.trace}" if settings.trace else load_words(settings.rate, settings.concurrency)
    fleet = f"{args.replicas} replica(s), {args.router}"
    heading = f"{settings.requests} requests, {load}, {fleet}, seed {settings.seed}"
    if args.seeds > 1:
        heading += f" to {settings.seed + args.seeds - 1}: means (and from least to most)"
    if args.sweep:
        heading += ", but for what stands with each arm"
    return f"{heading}\n\n{render_table(headers, lines)}"


def _line(outcomes: list[Outcome], price: Price, slo: Slo) -> list[str]:
    cells = [
        _over_seeds([outcome.values[place] for outcome in outcomes], figure.text, missing=figure.text(None))
        for place, figure in enumerate(FIGURES)
    ]
    cells.append(_over_seeds([outcome.mean_batch for outcome in outcomes], "{:.2f}".format))
    cells.append(_over_seeds([outcome.dead_share for outcome in outcomes], share))
    cells.append(share(fmean(outcome.failed_share for outcome in outcomes)))
    replica_s = fmean(outcome.replica_s for outcome in outcomes)
    cells.append(f"{replica_s / 3600:.3g}")
    if price.is_known:
        num_tokens = fmean(outcome.num_tokens for outcome in outcomes)
        # Where every request was refused at once no time passes.
        cost = price.per_million_tokens(num_tokens / replica_s if replica_s else 0.0)
        cells.append(MISSING if cost is None else f"{cost:.3g}")
    if slo:
        good = fmean(outcome.good_share or 0.0 for outcome in outcomes)
        missed = sorted({text for outcome in outcomes for text in outcome.missed})
        cells.append(f"{good:.0%}" + (f"; misses {', '.join(missed)}" if missed else ""))
    return cells


def _over_seeds(values: list[float | None], text: Callable[[float], str], *, missing: str = MISSING) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return missing
    if len(values) == 1:
        return text(known[0])
    return f"{text(fmean(known))} ({text(min(known))} to {text(max(known))})"


def _verify(paths: list[Path], calibration: Calibration, out: Path | None) -> int:
    runs = verify_all(paths, calibration)
    calibration = calibration.model_copy(update={"verified": median_errors(runs, calibration.digest)})
    if out:
        write_calibration(out, calibration)
    print(f"{calibration.in_words()}\n\n{render_verified(runs)}")
    return 1 if any(run.is_off for run in runs) else 0
