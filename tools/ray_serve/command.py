"""`lab serve-ray`: replicas of one service on a Ray cluster, until a signal ends them.

The cluster and its Serve stay, where they were there before; only the application is taken down. Accepted
requests are finished either way.
"""

from __future__ import annotations

import argparse
import signal
import threading
from typing import Any

from ray import serve

from adapters.base import ConfigError
from harness.settings import SETTING_NAMES
from services import main
from services.read_settings import read_settings
from services.settings import Settings
from tools.ray_serve.cluster import add_address_option, connected
from tools.ray_serve.replica import APPLICATION, deployment, target_ongoing_requests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    main.add_arguments(parser)
    add_address_option(parser)
    parser.add_argument(
        "--replicas",
        type=_replicas,
        default=(1, 1),
        metavar="N or MIN:MAX",
        help="how many; a range scales on ongoing requests (default 1)",
    )
    parser.add_argument(
        "--downscale-delay-s",
        type=float,
        default=300,
        metavar="SECONDS",
        help="quiet time before a replica goes (default 300)",
    )
    parser.add_argument(
        "--num-cpus", type=float, help="CPUs that a replica takes of a node (default N_THREADS)"
    )
    parser.add_argument("--num-gpus", type=float, default=0, help="GPUs that it takes (default 0)")


def _replicas(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1, or MIN:MAX as in 1:3")
    return found


def run(args: argparse.Namespace) -> int:
    """Serve until a signal.

    Raises:
        ConfigError: a setting cannot work, or there is no such cluster.
    """
    settings = read_settings(main.overrides(args), passed_over=SETTING_NAMES)
    if settings.port == 0:
        raise ConfigError("PORT is 0, but the proxies of all nodes share one port: name it")
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    stop = threading.Event()
    with connected(args.address):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(deployment(settings).options(**_options(args, settings)).bind(given), name=APPLICATION)
        print(f"ready on http://{settings.host}:{settings.port}", flush=True)
        stop.wait()
        serve.delete(APPLICATION)
        if args.address is None:
            serve.shutdown()
    return 0


def _options(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    num_cpus = settings.num_threads if args.num_cpus is None else args.num_cpus
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": num_cpus, "num_gpus": args.num_gpus}}
    least, most = args.replicas
    if least == most:
        return options | {"num_replicas": least}
    return options | {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": target_ongoing_requests(settings),
            "upscale_delay_s": 1,
            "downscale_delay_s": args.downscale_delay_s,
            "metrics_interval_s": 1,
            "look_back_period_s": 2,
        }
    }
