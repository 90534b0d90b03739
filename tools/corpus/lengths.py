"""How long prompts and answers are: seeded draws from heavy-tailed, chat-like distributions.

Every 64 lengths in a row cover the whole distribution evenly, so 64 requests carry the load of thousands.
Draws are integers of SHA-256 in counter mode, so no library can change the corpus.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

T = TypeVar("T")

BLOCK = 64


class Draws:
    """An endless stream of draws; the same key gives the same stream everywhere."""

    def __init__(self, *key: str | int) -> None:
        self._key = ":".join(map(str, key)).encode()
        self._num_drawn = 0

    def bits64(self) -> int:
        self._num_drawn += 1
        digest = hashlib.sha256(b"%s:%d" % (self._key, self._num_drawn)).digest()
        return int.from_bytes(digest[:8], "big")

    def below(self, limit: int) -> int:
        """An integer in `0 .. limit - 1`; its bias, `limit / 2**64`, is far below notice."""
        return self.bits64() * limit >> 64

    def unit(self) -> float:
        return (self.bits64() >> 11) * 2.0**-53

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths in tokens. `mean` is that of the distribution before it is cut at `least` and `most`."""

    mean: float
    sigma: float
    least: int
    most: int

    def quantile(self, share: float) -> int:
        location = math.log(self.mean) - self.sigma**2 / 2
        length = math.exp(location + self.sigma * NormalDist().inv_cdf(share))
        return min(max(round(length), self.least), self.most)


# Both are log-normal with the spread of a real chat service and a mean that suits small machines.
# Source: Azure LLM inference trace 2023, conversation (Azure/AzurePublicDataset; Splitwise, ISCA 2024):
# over its 19,366 requests the standard deviation of ln(ContextTokens) is 0.985, that of
# ln(GeneratedTokens) 0.859, and the two logarithms hardly correlate (0.09), so they are drawn apart.
PROMPT_TOKENS = LogNormal(mean=60, sigma=0.985, least=6, most=500)
OUTPUT_TOKENS = LogNormal(mean=80, sigma=0.859, least=4, most=512)


def stratified_lengths(distribution: LogNormal, num: int, draws: Draws) -> list[int]:
    """`num` lengths. Each block of 64 holds one from each 64th of the distribution, in random order.

    Within its 64th, a length moves from block to block along a van der Corput sequence, so that many
    blocks together are as even as one. A longer list starts with the shorter one.
    """
    starts = [draws.unit() for _ in range(BLOCK)]
    lengths: list[int] = []
    for block in range(-(-num // BLOCK)):
        shift = _van_der_corput(block)
        shares = [(stratum + (start + shift) % 1.0) / BLOCK for stratum, start in enumerate(starts)]
        lengths += draws.shuffled([distribution.quantile(max(share, 1e-9)) for share in shares])
    return lengths[:num]


def _van_der_corput(index: int) -> float:
    """The bits of `index` mirrored at the binary point: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(f"{index:032b}"[::-1], 2) * 2.0**-32
