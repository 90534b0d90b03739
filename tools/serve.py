"""`lab serve`: one service, which passes over the names in `.env` that the harness reads.

The service does not know the harness, so the two are told of each other here.
"""

from __future__ import annotations

import argparse

from harness.settings import SETTING_NAMES
from services import main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    main.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return main.run(args, SETTING_NAMES)
