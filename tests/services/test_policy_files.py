"""What every policy owes its reader: a file that is read at a glance, and where it comes from."""

from __future__ import annotations

import inspect

import pytest

from services.admissions import ADMISSIONS
from services.kv_policies import KV_POLICIES
from services.layouts import LAYOUTS
from services.orders import ORDERS


@pytest.mark.parametrize(
    "policy", [*ORDERS.values(), *ADMISSIONS.values(), *LAYOUTS.values(), *KV_POLICIES.values()]
)
def test_a_policy_is_one_short_file_that_names_its_source(policy: type) -> None:
    module = inspect.getmodule(policy)
    assert module is not None
    assert module.__doc__ is not None
    assert "Source: " in module.__doc__
    assert module.__name__.rpartition(".")[2] == policy.name
    assert len(inspect.getsource(module).splitlines()) < 60
