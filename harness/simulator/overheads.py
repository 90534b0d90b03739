"""The time around the steps of a real service: the loop's own, the API's and the client's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds. Zeros are a service that costs nothing but its steps."""

    gap_fixed_s: float = 0.0
    """From the end of a step to the start of the next one, where there is one."""
    gap_row_s: float = 0.0
    submit_s: float = 0.0
    """From the client's sending to the API's receiving."""
    accept_s: float = 0.0
    """From there to the engine's inbox; the API takes one request at a time."""
    deliver_fixed_s: float = 0.0
    """From the end of a step to the client's stamp."""
    deliver_row_s: float = 0.0
    overlaps: bool = False
    """Each step is launched while the one before computes, as on CUDA; the gap is a part of that time."""

    def gap_s(self, rows: int) -> float:
        return self.gap_fixed_s + self.gap_row_s * rows

    def deliver_s(self, rows: int) -> float:
        return self.deliver_fixed_s + self.deliver_row_s * rows
