"""Who joins under each admission, and what a batch of one bin saves."""

from __future__ import annotations

from services.engine.policies import Policies
from tests.services.virtual_lab import VirtualLab


def test_a_gate_opens_when_half_of_the_slots_are_free() -> None:
    lab = VirtualLab("continuous", policies=Policies(admission="gated"))  # four slots
    lab.submit(1, 3, 5, 5)
    lab.submit(1, 1)
    lab.run()
    assert [live for live, _ in lab.batches] == [
        [0, 1, 2, 3],
        [1, 2, 3],  # one slot is free: not enough
        [1, 2, 3],
        [2, 3, 4, 5],  # two are
        [2, 3],
    ]


def dead_rows(policies: Policies) -> tuple[int, list[list[int]]]:
    """Four requests of 4 tokens and two of 32, which come in between, in batches of four."""
    lab = VirtualLab("dynamic", policies=policies)
    for budget in (4, 32, 4, 4, 32, 4):
        lab.submit(budget)
    lab.scheduler.drain()
    lab.run()
    return sum(len(dead) for _, dead in lab.batches), [lab.batches[0][0], lab.batches[-1][0]]


def test_a_batch_of_one_bin_has_no_dead_rows() -> None:
    assert dead_rows(Policies(admission="multi_bin", order="multi_bin")) == (0, [[0, 2, 3, 5], [1, 4]])
    assert dead_rows(Policies(order="multi_bin")) == (0, [[0, 2, 3, 5], [1, 4]])
    num_dead, _ = dead_rows(Policies())
    assert num_dead > 50


def test_a_bin_with_fewer_than_a_batch_is_not_filled_up() -> None:
    first: list[list[int]] = []
    for admission in ("all", "multi_bin"):
        lab = VirtualLab("dynamic", policies=Policies(admission=admission, order="multi_bin"))
        for budget in (4, 32, 5):
            lab.submit(budget)
        lab.scheduler.drain()
        lab.run()
        first.append(lab.batches[0][0])
    assert first == [[0, 2, 1], [0, 2]]


def test_groups_join_whole() -> None:
    lab = VirtualLab("static", policies=Policies(admission="multi_bin"))
    lab.submit(4, 32, 4)
    lab.run()
    assert lab.batches[0][0] == [0, 1, 2]
