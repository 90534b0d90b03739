"""The Ray cluster that a command works on: one that runs, or one of its own on this machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
from collections.abc import Iterator

import ray

from adapters.base import ConfigError

_CONNECT_S = 10.0


def add_address_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        help="a Ray cluster that runs: auto, or HOST:6379 (default: one of its own on this machine)",
    )


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray's report of its use to its makers is off, unless RAY_USAGE_STATS_ENABLED says otherwise.

    Raises:
        ConfigError: no cluster answers at `address`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = (address or "").rpartition(":")
    try:
        if port.isdigit() and "/" not in host:  # Ray itself would try for 14 minutes
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
            except (OSError, OverflowError) as error:
                raise ConnectionError(error) from error
        ray.init(address or "local", include_dashboard=False if address is None else None)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
