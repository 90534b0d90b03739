"""The registry of step layouts, by name. A new one is one file beside this one and one entry below."""

from __future__ import annotations

from services.layouts.base import StepLayout
from services.layouts.decode_first import DecodeFirst
from services.layouts.prefill_first import PrefillFirst
from services.layouts.whole_prompts import WholePrompts

_LAYOUTS: tuple[type[StepLayout], ...] = (DecodeFirst, PrefillFirst, WholePrompts)

LAYOUTS: dict[str, type[StepLayout]] = {layout.name: layout for layout in _LAYOUTS}
