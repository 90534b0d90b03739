"""`lab simulate-ray`: the arms, points and seeds of a simulation as tasks of a Ray cluster, one CPU each.

Every node has this package installed, and a corpus or a trace that is named, under the path that it has where
the command runs; settings are those of the environment there. Figures come back to the table; files of rows
would stay on the nodes, so that only `--brief` is taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import ray
from ray.exceptions import RayTaskError

from adapters.base import ConfigError, LabError
from harness.commands import simulate
from harness.simulator.cells import Cell, Outcome, play, with_whole_paths
from tools.ray_serve.cluster import add_address_option, connected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    simulate.add_arguments(parser)
    add_address_option(parser)


def run(args: argparse.Namespace) -> int:
    """As `lab simulate`.

    Raises:
        LabError: a setting cannot work, no cluster answers, or files would be written.
    """
    if not args.brief or args.verify:
        raise ConfigError("lab simulate-ray takes --brief alone: files of rows would stay on the nodes")
    with connected(args.address):
        return simulate.run(args, _play_all)


def _play_all(cells: Iterable[Cell], _: int) -> Iterator[Outcome]:
    """In their order; `--jobs` is the cluster's to say. A task that its node lost is played again."""
    for outcome in [_play.remote(with_whole_paths(cell)) for cell in cells]:
        try:
            yield ray.get(outcome)
        except RayTaskError as error:
            if isinstance(error.cause, LabError):
                raise error.cause from error
            raise


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
def _play(cell: Cell) -> Outcome:
    return play(cell)
