"""The axes beside the strategy, as settings: in which order the queue stands, and what a step carries."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.base import ConfigError
from adapters.description import option
from services.layouts import LAYOUTS
from services.layouts.base import StepLayout
from services.orders import ORDERS
from services.orders.base import OrderConfig, QueueOrder
from services.orders.prediction import LengthOracle


@dataclass(frozen=True, slots=True)
class Policies:
    """Raises ConfigError for a name that nothing has, or a value that cannot work."""

    order: str = option("fcfs", f"In which order the queue stands: {', '.join(ORDERS)} (docs/policies.md).")
    length_oracle: str = option(
        "max_tokens",
        "How sjf, hrrn and multi_bin know the length of an answer: max_tokens; exact (expected_tokens of the "
        "request, else max_tokens); or a number, the spread of a log-normal error on exact.",
    )
    edf_ttft_ms: str = option(
        "10000:2000:500", "edf: when a first token is due, in milliseconds, for priorities 0, 1 and 2."
    )
    step_layout: str = option(
        "decode_first", f"What a step carries: {', '.join(LAYOUTS)} (docs/policies.md)."
    )

    def __post_init__(self) -> None:
        for name, value, known in (("ORDER", self.order, ORDERS), ("STEP_LAYOUT", self.step_layout, LAYOUTS)):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(known)}")
        self.make_oracle()
        if not all(0 <= due_s <= 86_400 for due_s in self._slo_ttft_s()):
            raise ConfigError(f"EDF_TTFT_MS is {self.edf_ttft_ms!r}: each must be from 0 to 86400000")

    def make_order(self, aging_s: float) -> QueueOrder:
        return ORDERS[self.order](OrderConfig(aging_s, self._slo_ttft_s()))

    def make_layout(self) -> StepLayout:
        return LAYOUTS[self.step_layout]()

    def make_oracle(self) -> LengthOracle:
        return LengthOracle.of(self.length_oracle)

    def _slo_ttft_s(self) -> tuple[float, float, float]:
        try:
            low, middle, high = (float(ms) / 1000 for ms in self.edf_ttft_ms.split(":"))
        except ValueError:
            raise ConfigError(
                f"EDF_TTFT_MS is {self.edf_ttft_ms!r}: it must be three numbers with colons between them"
            ) from None
        return low, middle, high
