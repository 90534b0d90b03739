"""The axes beside the strategy, as settings: the order of the queue, the layout of a step, and KV memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adapters.base import KV_BLOCK, ConfigError
from adapters.description import option
from services.admissions import ADMISSIONS
from services.admissions.base import AdmissionPolicy
from services.engine.limits import SchedulerLimits
from services.kv_policies import KV_POLICIES
from services.kv_policies.base import KvPolicy
from services.layouts import LAYOUTS
from services.layouts.base import StepLayout
from services.orders import ORDERS
from services.orders.base import OrderConfig, QueueOrder
from services.orders.prediction import LengthOracle


@dataclass(frozen=True, slots=True)
class Policies:
    """Raises ConfigError for a name that nothing has, or a value that cannot work."""

    order: str = option("fcfs", f"In which order the queue stands: {', '.join(ORDERS)} (docs/policies.md).")
    admission: str = option(
        "all",
        f"How many join of those that the strategy lets in: {', '.join(ADMISSIONS)} (docs/policies.md). "
        "A strategy that takes groups lets all of one join.",
    )
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
    kv_policy: str = option(
        "reserve", f"How much KV memory a sequence holds: {', '.join(KV_POLICIES)} (docs/policies.md)."
    )
    kv_watermark: float = option(
        0.05,
        "paged: share of the KV memory that stays free when a sequence joins others.",
        ge=0,
        lt=1,
        allow_inf_nan=False,
    )
    priority_preemption: bool = option(
        False,
        "paged with fcfs: where no slot or memory is free, a waiting request takes the place of running ones "
        "that stand behind it by priority and arrival, with aging (docs/policies.md).",
    )
    prefix_cache: bool = option(
        False,
        "paged: prompts that begin alike share the blocks of their common beginning, which stay until memory "
        "is needed (docs/policies.md). Only with backends that keep keys and values in blocks.",
    )
    kv_capacity_tokens: int = option(
        0,
        "KV positions that the scheduler gives out, all sequences together; never more than the backend has. "
        "0: as many as it has.",
        ge=0,
        le=1_000_000_000,
    )

    def __post_init__(self) -> None:
        for name, value, known in (
            ("ORDER", self.order, ORDERS),
            ("ADMISSION", self.admission, ADMISSIONS),
            ("STEP_LAYOUT", self.step_layout, LAYOUTS),
            ("KV_POLICY", self.kv_policy, KV_POLICIES),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(known)}")
        if self.prefix_cache and KV_POLICIES[self.kv_policy].block_tokens != KV_BLOCK:
            raise ConfigError(
                f"PREFIX_CACHE=1 shares blocks, and KV_POLICY={self.kv_policy} has none: set KV_POLICY=paged"
            )
        if self.priority_preemption and not (KV_POLICIES[self.kv_policy].grows and self.order == "fcfs"):
            raise ConfigError(
                "PRIORITY_PREEMPTION=1 is for KV_POLICY=paged with ORDER=fcfs: it needs both, not "
                f"ORDER={self.order} and KV_POLICY={self.kv_policy}"
            )
        self.make_oracle()
        if not all(0 <= due_s <= 86_400 for due_s in self._slo_ttft_s()):
            raise ConfigError(f"EDF_TTFT_MS is {self.edf_ttft_ms!r}: each must be from 0 to 86400000")

    def make_order(self, aging_s: float) -> QueueOrder:
        return ORDERS[self.order](OrderConfig(aging_s, self._slo_ttft_s()))

    def make_admission(self) -> AdmissionPolicy:
        return ADMISSIONS[self.admission]()

    def make_layout(self) -> StepLayout:
        return LAYOUTS[self.step_layout]()

    def make_kv_policy(self) -> KvPolicy:
        return KV_POLICIES[self.kv_policy](self.kv_watermark)

    def within(self, limits: SchedulerLimits) -> SchedulerLimits:
        """`limits` with the KV memory that may be given out, in whole blocks; twice is the same as once.

        Raises:
            ConfigError: there is not one block.
        """
        capacity_tokens = limits.kv_capacity_tokens
        if self.kv_capacity_tokens:
            capacity_tokens = min(capacity_tokens, self.kv_capacity_tokens)
        size = KV_POLICIES[self.kv_policy].block_tokens
        if capacity_tokens < size:
            raise ConfigError(
                f"{capacity_tokens} KV positions are no block of {size}: raise KV_CAPACITY_TOKENS"
            )
        return replace(limits, kv_capacity_tokens=capacity_tokens // size * size)

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
