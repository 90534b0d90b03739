"""The registry of KV policies, by name. A new one is one file beside this one and one entry below."""

from __future__ import annotations

from services.kv_policies.base import KvPolicy
from services.kv_policies.paged import Paged
from services.kv_policies.reserve import Reserve

_KV_POLICIES: tuple[type[KvPolicy], ...] = (Reserve, Paged)

KV_POLICIES: dict[str, type[KvPolicy]] = {policy.name: policy for policy in _KV_POLICIES}
