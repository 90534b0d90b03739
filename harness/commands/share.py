"""Shares as people write them on a command line: 5%, 0.05.

What enters is text; what leaves is a number from 0 to 1. Knows nothing of what it is a share of.
"""

from __future__ import annotations

import argparse


def parse_share(text: str) -> float:
    """Read `5%` or `0.05`.

    Raises:
        argparse.ArgumentTypeError: it is no number, or not between 0 and 1.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 5% or 0.05")
    return value
