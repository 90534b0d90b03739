"""Random numbers whose values no library's generator can change: SHA-256 of a seed and a counter."""

from __future__ import annotations

import hashlib
import math


class Draws:
    """Uniform, exponential, normal and gamma numbers of one seed, in a fixed order."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._next = 0

    def uniform(self) -> float:
        """From (0, 1]."""
        index, self._next = self._next, self._next + 1
        block = hashlib.sha256(f"{self._seed}/{index}".encode()).digest()
        return ((int.from_bytes(block[:8], "big") >> 11) + 1) / (1 << 53)

    def exponential(self) -> float:
        return -math.log(self.uniform())

    def normal(self) -> float:
        return math.sqrt(2 * self.exponential()) * math.cos(2 * math.pi * self.uniform())

    def gamma(self, shape: float) -> float:
        """Of mean `shape`. Source: Marsaglia and Tsang (2000), with their step for shapes below 1."""
        if shape < 1:
            return float(self.gamma(shape + 1) * self.uniform() ** (1 / shape))
        d = shape - 1 / 3
        c = 1 / math.sqrt(9 * d)
        while True:
            x = self.normal()
            v = (1 + c * x) ** 3
            if v > 0 and math.log(self.uniform()) < 0.5 * x * x + d - d * v + d * math.log(v):
                return d * v
