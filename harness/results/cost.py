"""What a million output tokens cost, from the price of the machine or of the tokens.

Prices are US dollars. Without a price there is no cost, not a cost of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.base import ConfigError
from adapters.dotenv import reading_dotenv
from harness.settings import ReportSettings


@dataclass(frozen=True, slots=True)
class Price:
    """`per_hour_usd` of the machine (PRICE_PER_HOUR_USD) or `per_token_usd` (PRICE_PER_TOKEN_USD)."""

    per_hour_usd: float | None = None
    per_token_usd: float | None = None

    @property
    def is_known(self) -> bool:
        return self.per_hour_usd is not None or self.per_token_usd is not None

    def per_million_tokens(self, tokens_per_s: float) -> float | None:
        """The price of a token, where one is set, does not depend on the speed."""
        if self.per_token_usd is not None:
            return self.per_token_usd * 1e6
        if self.per_hour_usd is None or tokens_per_s <= 0:
            return None
        return self.per_hour_usd / (tokens_per_s * 3600) * 1e6


def read_price(per_hour_usd: float | None, per_token_usd: float | None) -> Price:
    """Options over PRICE_PER_HOUR_USD and PRICE_PER_TOKEN_USD of the environment or `.env`.

    Raises:
        ConfigError: a price is no number above 0.
    """
    prices: list[float | None] = []
    with reading_dotenv():
        settings = ReportSettings()
    for given, text, name in (
        (per_hour_usd, settings.price_per_hour_usd, "PRICE_PER_HOUR_USD"),
        (per_token_usd, settings.price_per_token_usd, "PRICE_PER_TOKEN_USD"),
    ):
        try:
            price = given if given is not None else None if text is None else float(text)
        except ValueError:
            price = -1.0
        if price is not None and not price > 0:
            raise ConfigError(f"{name} must be a number of dollars above 0, not {given or text}")
        prices.append(price)
    return Price(*prices)
