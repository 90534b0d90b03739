"""`lab bench-ray`: the shards of one run as Ray tasks, spread over the nodes, and merged here.

Every node has this package installed, reaches the URL, and has the corpus at the same path. All shards
begin at one instant, so the clocks of the nodes have to agree.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import tools
from adapters.base import ConfigError, LabError
from harness.commands import bench, merge
from harness.results.output_dir import make_folder, utc_stamp
from harness.settings import HarnessSettings, read_settings
from tools.ray_serve.cluster import add_address_option, connected

_ROOM_WITHIN_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench.add_arguments(parser)
    add_address_option(parser)
    parser.add_argument("--tasks", type=int, default=2, help="shards, each a task with a CPU (default 2)")
    parser.add_argument(
        "--lead-s", type=float, default=30, help="seconds from now until all shards begin (default 30)"
    )


def run(args: argparse.Namespace) -> int:
    """Send all shards, merge them, print, and return the exit status of the merge.

    Raises:
        LabError: a shard could not be sent; the message is its own.
    """
    settings = read_settings(args)
    if settings.url is None:
        raise ConfigError("URL is missing: the shards measure one server that already runs")
    folder = settings.out / "ray" / utc_stamp()
    make_folder(folder)
    with connected(args.address):
        answers = _send_all(_environment(settings), args.tasks, args.lead_s)
    files = []
    for index, (error, content) in enumerate(answers):
        if not content:
            raise LabError(f"shard {index}/{args.tasks}: {error.strip() or 'it wrote no rows'}")
        files.append(folder / f"{index}.parquet")
        files[-1].write_bytes(content)
    return merge.run(argparse.Namespace(files=files, out=folder / "merged.parquet"))


def _environment(settings: HarnessSettings) -> dict[str, str]:
    """What was set here, as the tasks read it."""
    given = settings.model_dump(mode="json", include=settings.model_fields_set - {"out", "api_key"})
    if settings.api_key is not None:
        given["api_key"] = settings.api_key.get_secret_value()
    if settings.corpus is not None and settings.corpus.exists():
        given["corpus"] = settings.corpus.resolve()
    return {name.upper(): str(value) for name, value in given.items() if value is not None}


def _send_all(environment: dict[str, str], num: int, lead_s: float) -> list[tuple[str, bytes]]:
    """What each shard wrote to stderr, and its rows.

    Raises:
        ConfigError: the cluster has no room for all shards at once.
    """
    room = placement_group([{"CPU": 1}] * num, strategy="SPREAD")
    try:
        ray.get(room.ready(), timeout=_ROOM_WITHIN_S)
    except GetTimeoutError:
        raise ConfigError(f"the cluster has no {num} free CPUs for {num} shards at once") from None
    try:
        start_at = f"{time.time() + lead_s:.3f}"
        return list(
            ray.get(
                [
                    _send.options(scheduling_strategy=PlacementGroupSchedulingStrategy(room, index)).remote(
                        environment | {"SHARD": f"{index}/{num}", "START_AT": start_at}
                    )
                    for index in range(num)
                ]
            )
        )
    finally:
        remove_placement_group(room)


@ray.remote(num_cpus=1, max_retries=0)  # type: ignore[untyped-decorator]
def _send(environment: dict[str, str]) -> tuple[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tools.cli", "bench"],
            cwd=folder,  # no .env there
            env={
                **os.environ,
                "PYTHONPATH": str(Path(tools.__file__).parents[1]),
                **environment,
                "OUT": folder,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        files = [
            path for path in Path(folder).rglob("*Z.parquet") if not path.name.endswith(".steps.parquet")
        ]
        return done.stderr, files[0].read_bytes() if files else b""
