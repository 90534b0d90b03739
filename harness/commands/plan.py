"""`lab plan`: how many replicas of which arm, behind which router, meet the SLOs at the least cost.

Every figure is simulated, from a calibration. Exit status: 0, 1 when nothing that was tried meets the SLOs,
or 2 when nothing could be simulated.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path

from adapters.base import ConfigError
from harness.commands.fleet_options import (
    OF_REAL_RUNS,
    add_fleet_options,
    add_price_option,
    fleet_options,
    print_origin,
    read_source,
)
from harness.commands.options import add_corpus_option, add_slo_option
from harness.comparing.arms import parse_arm, split_names
from harness.page.charts import Point, lines
from harness.page.files import write_picture
from harness.page.picture import Picture
from harness.results.cost import read_price
from harness.results.output_dir import free_path, utc_stamp
from harness.results.slo import Slo
from harness.results.table import MISSING, render_table, share
from harness.settings import add_setting_options, read_settings
from harness.simulator.brief import long_plan, refuse_limits
from harness.simulator.planning import Candidate, probe, search
from harness.simulator.routers import ROUTERS
from harness.simulator.simulation import read_arm

DEFAULT_REQUESTS = 2000
"""Of a trace, its first ones."""
_DEFAULT_ROUTERS = ["round_robin", "least_outstanding"]
_DEFAULT_BATCHES = [8, 16, 32]
_CHARTED = 6
"""The cheapest ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_setting_options(parser, leave_out=OF_REAL_RUNS)
    add_corpus_option(parser)
    add_slo_option(parser)
    add_fleet_options(parser)
    add = parser.add_argument
    add(
        "--variants", nargs="+", metavar="NAME", default=["dynamic", "continuous"],
        help="strategies with settings, as in `lab compare` (default: dynamic continuous)",
    )  # fmt: skip
    add(
        "--max-batch", type=int, nargs="+", metavar="N", default=_DEFAULT_BATCHES,
        help="values of MAX_BATCH for arms that set none (default: 8 16 32)",
    )  # fmt: skip
    add(
        "--routers", nargs="+", choices=ROUTERS, metavar="NAME", default=_DEFAULT_ROUTERS,
        help=f"of {', '.join(ROUTERS)} (default: {' '.join(_DEFAULT_ROUTERS)})",
    )  # fmt: skip
    add("--most-replicas", type=int, default=256, metavar="N", help="no more are tried (default 256)")
    add_price_option(parser)
    add(
        "--chart",
        type=Path,
        metavar="PATH",
        help="of the frontier, .svg or .png (default results/plan/)",
    )


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        LabError: a setting cannot work, or a file cannot be read.
    """
    slo = Slo(tuple(args.slo))
    if not slo:
        raise ConfigError("a plan needs limits: --slo ttft_p95_ms=500,tpot_p95_ms=50")
    refuse_limits(slo)
    if args.autoscale:
        raise ConfigError("a plan says how many replicas there are: leave out --autoscale")
    if args.most_replicas < 1 or min(args.max_batch) < 1:
        raise ConfigError("--most-replicas and --max-batch must be at least 1")
    price = read_price(args.price_per_hour_usd, None).per_hour_usd
    calibration = read_source(args.calibrate, allow_busy=args.allow_busy)
    settings = read_settings(args)
    if "requests" not in settings.model_fields_set:
        settings = settings.model_copy(update={"requests": DEFAULT_REQUESTS})
    _, schedule = long_plan(settings, allow_changed_corpus=args.allow_changed_corpus)
    candidates = []
    for text, max_batch, router in product(split_names(args.variants), args.max_batch, args.routers):
        name, own = parse_arm(text)
        if "MAX_BATCH" in own and max_batch != args.max_batch[0]:
            continue
        own = {"MAX_BATCH": str(max_batch)} | dict(own)
        label = " ".join([name, *(f"{key}={value}" for key, value in own.items())])
        candidate = Candidate(label, router)
        options = fleet_options(args, settings, replicas=1, router=router, brief=True)
        arm = read_arm(name, own, calibration)
        search(
            candidate, partial(probe, candidate, arm, calibration, schedule, options, slo), args.most_replicas
        )
        candidates.append(candidate)
    candidates.sort(key=_rank)
    print(_render(candidates, slo, price, args.most_replicas))
    path = args.chart or free_path(settings.out / "plan", utc_stamp(), ".svg")
    write_picture(_frontier(candidates, price, slo), path)
    most: dict[str, int] = {}
    for candidate in candidates:
        most |= {name: max(value, most.get(name, 0)) for name, value in candidate.most.items()}
    print_origin(calibration, most)
    print(f"frontier: {path}")
    return 0 if candidates[0].fewest else 1


def _rank(candidate: Candidate) -> tuple[float, float]:
    fewest = candidate.fewest
    if fewest:
        return fewest.num_replicas, fewest.at_risk
    return float("inf"), min(probe.at_risk for probe in candidate.probes.values())


def _render(candidates: list[Candidate], slo: Slo, price: float | None, most_replicas: int) -> str:
    """The cheapest first; of equal cost the one with the fewest requests at risk."""
    limits = slo.on_the_run
    headers = ["simulated arm", "router", "replicas", *(["USD/hour"] if price else []), "at risk"]
    headers += [limit.figure.label for limit in limits]
    lines = []
    for candidate in candidates:
        fewest = candidate.fewest
        shown = fewest or candidate.probes[max(candidate.probes)]
        number = f"{fewest.num_replicas}" if fewest else f"> {most_replicas}"
        cost = [f"{fewest.num_replicas * price:.2f}" if fewest else MISSING] if price else []
        values = [limit.figure.text(shown.values[limit.figure.key]) for limit in limits]
        lines.append([candidate.arm, candidate.router, number, *cost, share(shown.at_risk), *values])
    best = candidates[0]
    answer = f"Nothing that was tried meets {slo.text()} with up to {most_replicas} replicas."
    if best.fewest:
        cost_text = f", {best.fewest.num_replicas * price:.2f} USD an hour" if price else ""
        answer = (
            f"{best.fewest.num_replicas} replica(s) of {best.arm} behind {best.router} meet "
            f"{slo.text()}{cost_text}; {share(best.fewest.at_risk)} of the requests are at risk."
        )
    return f"{render_table(headers, lines)}\n\n{answer}"


def _frontier(candidates: list[Candidate], price: float | None, slo: Slo) -> Picture:
    """Of each arm and router, the share of requests at risk over what was tried."""
    points: list[Point] = [
        (f"{c.arm}, {c.router}", number * (price or 1.0), probe.at_risk)
        for c in candidates[:_CHARTED]
        for number, probe in sorted(c.probes.items())
    ]
    names = list(dict.fromkeys(point[0] for point in points))
    x = "USD an hour" if price else "replicas"
    caption = f"Share of simulated requests above {slo.text()}. Down and to the left is better."
    title = "Requests at risk over cost"
    drawn = lines(title, caption, points, x, "share at risk", names, mark="dots", is_of_arms=False)
    assert drawn is not None, "every candidate has a probe"
    return drawn
