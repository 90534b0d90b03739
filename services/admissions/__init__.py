"""The registry of admissions, by name. A new one is one file beside this one and one entry below."""

from __future__ import annotations

from services.admissions.all import All
from services.admissions.base import AdmissionPolicy
from services.admissions.gated import Gated
from services.admissions.multi_bin import MultiBin

_ADMISSIONS: tuple[type[AdmissionPolicy], ...] = (All, Gated, MultiBin)

ADMISSIONS: dict[str, type[AdmissionPolicy]] = {admission.name: admission for admission in _ADMISSIONS}
