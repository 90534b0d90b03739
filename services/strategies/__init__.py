"""The registry of strategies, by name.

The command line, Make, the service and the harness take the names from `VARIANTS`. A new strategy is one file
beside this one and one entry in the tuple below (docs/add-a-strategy.md).
"""

from __future__ import annotations

from adapters.base import ConfigError
from services.strategies.base import BatchingStrategy
from services.strategies.baseline import Baseline
from services.strategies.continuous import Continuous
from services.strategies.dynamic import Dynamic
from services.strategies.static import Static

_STRATEGIES: tuple[type[BatchingStrategy], ...] = (
    Baseline,
    Static,
    Dynamic,
    Continuous,
)

VARIANTS: dict[str, type[BatchingStrategy]] = {strategy.name: strategy for strategy in _STRATEGIES}

ALIASES: dict[str, str] = {
    "baseline_single": "baseline",
    "static_batch": "static",
    "dynamic_batch": "dynamic",
    "continuous_batch": "continuous",
}


def resolve_variant(name: str) -> str:
    """The canonical name behind `name`, which may be an old one; case and hyphens do not matter.

    Raises:
        ConfigError: no strategy has this name.
    """
    plain = name.strip().lower().replace("-", "_")
    canonical = ALIASES.get(plain, plain)
    if canonical not in VARIANTS:
        raise ConfigError(f"there is no strategy {name!r}: VARIANT must be one of {', '.join(VARIANTS)}")
    return canonical
