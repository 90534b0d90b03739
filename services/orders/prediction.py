"""How many output tokens a sequence is expected to give, with a quality that is stated.

`max_tokens` takes the budget. `exact` takes `expected_tokens` of the request, where a client that replays
known lengths says them, and the budget otherwise. A number is the spread of a log-normal error on `exact`:
at 0.5 two of three predictions are within a factor of 1.65. The error is drawn from the prompt and the seed,
so that the same request always gets the same prediction.
"""

from __future__ import annotations

import math
import zlib
from array import array
from dataclasses import dataclass

from adapters.base import ConfigError, Sequence
from adapters.sampling import mix64


@dataclass(frozen=True, slots=True)
class LengthOracle:
    is_exact: bool
    spread: float

    @classmethod
    def of(cls, text: str) -> LengthOracle:
        """Raises: ConfigError: the setting is none of the three."""
        if text in ("max_tokens", "exact"):
            return cls(text == "exact", 0.0)
        try:
            spread = float(text)
        except ValueError:
            spread = math.nan
        if not 0 <= spread <= 10:
            raise ConfigError(f"LENGTH_ORACLE is {text!r}: it must be max_tokens, exact or a spread, 0 to 10")
        return cls(True, spread)

    def predict(self, seq: Sequence) -> float:
        """Output tokens, above 0."""
        tokens = seq.params.max_tokens
        if self.is_exact and seq.expected_tokens is not None:
            tokens = min(tokens, seq.expected_tokens)
        if not self.spread:
            return float(tokens)
        state = mix64(zlib.crc32(array("q", seq.prompt_token_ids).tobytes()) ^ seq.params.seed)
        radius = math.sqrt(-2 * math.log((state % 2**32 + 1) / 2**32))  # Box and Muller
        return tokens * math.exp(self.spread * radius * math.cos(2 * math.pi * (state >> 32) / 2**32))
