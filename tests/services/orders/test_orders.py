"""What stands first under each order, and how long somebody may be overtaken."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from adapters.base import ConfigError, SamplingParams, Sequence
from services.engine.policies import Policies
from services.engine.waiting_queue import WaitingQueue
from services.orders import ORDERS
from services.orders.base import OrderConfig
from services.orders.prediction import LengthOracle
from tests.services.virtual_lab import LIMITS, VirtualLab


def waiting(
    seq_id: int, arrival_s: float, *, tokens: int = 8, priority: int = 1, client: str = ""
) -> Sequence:
    return Sequence(
        seq_id,
        [1, 2, 3],
        SamplingParams(max_tokens=tokens),
        group_id=seq_id,
        arrival_s=arrival_s,
        priority=priority,
        client=client,
        predicted_tokens=float(tokens),
    )


def stands(order: str, sequences: list[Sequence], now_s: float = 10.0, aging_s: float = 10.0) -> list[int]:
    queue = WaitingQueue(Policies(order=order).make_order(aging_s))
    for seq in sequences:
        queue.push([seq])
    queue.arrange(now_s)
    return [seq.seq_id for seq in queue.sequences]


@pytest.mark.parametrize(
    ("order", "sequences", "expected"),
    [
        ("fcfs", [waiting(0, 0.0), waiting(1, 1.0, priority=2), waiting(2, 2.0, priority=0)], [1, 0, 2]),
        # 128 tokens are worth the ten seconds of aging: 400 tokens are worth 31 s, 300 are worth 23 s.
        (
            "sjf",
            [waiting(0, 0.0, tokens=400), waiting(1, 7.0, tokens=300), waiting(2, 9.0, tokens=300)],
            [1, 0, 2],
        ),
        ("edf", [waiting(0, 0.0, priority=0), waiting(1, 9.0, priority=2), waiting(2, 7.0)], [2, 1, 0]),
        # Waits of 10, 5 and 1 s over 100, 10 and 1 tokens.
        (
            "hrrn",
            [waiting(0, 0.0, tokens=100), waiting(1, 5.0, tokens=10), waiting(2, 9.0, tokens=1)],
            [2, 1, 0],
        ),
        (
            "multi_bin",
            [waiting(0, 0.0, tokens=65), waiting(1, 1.0, tokens=63), waiting(2, 2.0, tokens=127)],
            [0, 2, 1],
        ),
    ],
)
def test_who_stands_first(order: str, sequences: list[Sequence], expected: list[int]) -> None:
    assert stands(order, sequences) == expected


def test_without_aging_the_shortest_is_always_first() -> None:
    sequences = [waiting(0, 0.0, tokens=9), waiting(1, 9.0, tokens=8)]
    assert stands("sjf", sequences, aging_s=0.0) == [1, 0]
    assert stands("sjf", sequences, aging_s=1000.0) == [0, 1]


def test_a_long_answer_that_has_waited_for_long_is_next_under_hrrn() -> None:
    sequences = [waiting(0, 0.0, tokens=100), waiting(1, 99.0, tokens=10)]
    assert stands("hrrn", sequences, now_s=100.0) == [0, 1]  # 100 / 100 s a token against 1 / 10
    assert stands("hrrn", sequences, now_s=111.0) == [1, 0]  # from 99 * 100 / 90 = 110 s on


def test_clients_take_turns_by_what_they_were_served() -> None:
    many = [waiting(n, n / 10, client="many") for n in range(4)]
    one = waiting(9, 5.0, client="one")
    assert stands("vtc", [*many, one]) == [0, 9, 1, 2, 3]


def test_a_client_that_was_served_stands_behind_one_that_was_not_and_nobody_saves_up() -> None:
    order = ORDERS["vtc"](_config())
    a, b, late = (waiting(n, float(n), client=name) for n, name in enumerate(["a", "b", "late"]))
    order.arrange([[a], [b]], 0.0)
    order.served(a, 0)
    order.served(a, 50)
    order.served(b, 10)
    assert [g[0].client for g in order.arrange([[a], [b]], 0.0)] == ["b", "a"]
    # It comes when the least counter is 20, and starts there: one request, not as many as the others had.
    groups = [[late], [replace(late, arrival_s=4.0)], [b]]
    assert [g[0].client for g in order.arrange(groups, 0.0)] == ["b", "late", "late"]


def test_counters_of_clients_that_left_are_forgotten() -> None:
    order = ORDERS["vtc"](_config())
    for n in range(5000):
        seq = waiting(n, float(n), client=f"client {n}")
        order.arrange([[seq], [waiting(-1, 0.0, client="always")]], 0.0)
        order.served(seq, 1)
        order.served(waiting(-1, 0.0, client="always"), 1)
    assert len(order._counters) < 2000


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_a_request_stays_together_and_a_begun_one_stays_first(order: str) -> None:
    rng = random.Random(order)
    lab = VirtualLab("static", limits=replace(LIMITS, max_batch=2), policies=Policies(order=order))
    for _ in range(12):
        lab.submit(*[rng.randint(1, 9) for _ in range(rng.randint(1, 5))], priority=rng.randint(0, 2))
        lab.step()
    lab.run()
    admitted = sorted(lab.sequences.values(), key=lambda seq: (seq.admitted_s or 0, seq.seq_id))
    groups = [seq.group_id for seq in admitted]
    assert sorted(groups, key=groups.index) == groups, "a request ran in two parts, with another between them"


@pytest.mark.parametrize(("order", "bound_s"), [("fcfs", 2 * 3.0), ("sjf", 12 / 128 * 30.0), ("edf", 9.5)])
def test_nobody_is_overtaken_for_longer_than_the_bound(order: str, bound_s: float) -> None:
    rng = random.Random(1)
    limits = replace(LIMITS, max_batch=1, aging_s=30.0 if order == "sjf" else 3.0)
    lab = VirtualLab("continuous", limits=limits, step_s=0.25, policies=Policies(order=order))
    for _ in range(300):
        lab.submit(rng.randint(1, 12), priority=rng.randint(0, 2))
        lab.step()
    lab.run()
    seqs = sorted(lab.sequences.values(), key=lambda seq: seq.admitted_s or 0.0)
    overtaken_by = [
        later.arrival_s - seq.arrival_s
        for index, seq in enumerate(seqs)
        for later in seqs[:index]
        if later.arrival_s > seq.arrival_s
    ]
    assert overtaken_by, "the order of arrival: nothing was tried"
    assert max(overtaken_by) < bound_s


def test_two_clients_that_always_wait_get_the_same_service() -> None:
    limits = replace(LIMITS, max_batch=4)
    lab = VirtualLab("continuous", limits=limits, policies=Policies(order="vtc"))
    for n in range(60):  # one asks for a lot at once, the other for a little at a time
        lab.submit(20, client="much")
        lab.submit(2, client="little")
        if n < 20:
            lab.submit(20, client="much")
    while {seq.client for seq in lab.sequences.values() if seq.admitted_s is None} == {"much", "little"}:
        lab.step()
        served = dict.fromkeys(("much", "little"), 0)
        for seq in lab.sequences.values():
            if seq.admitted_s is not None:
                served[seq.client] += seq.num_prompt_tokens + 2 * len(seq.output_token_ids)
        assert abs(served["much"] - served["little"]) <= 2 * limits.max_batch * (3 + 2 * 20)


def test_predictions() -> None:
    seq = replace(waiting(0, 0.0, tokens=100), expected_tokens=40)
    assert LengthOracle.of("max_tokens").predict(seq) == 100
    assert LengthOracle.of("exact").predict(seq) == 40
    assert LengthOracle.of("0").predict(seq) == 40
    noisy = LengthOracle.of("0.5")
    assert noisy.predict(seq) == noisy.predict(seq)
    factors = [noisy.predict(replace(seq, prompt_token_ids=[n])) / 40 for n in range(4000)]
    within = sum(1 / 1.6487 < factor < 1.6487 for factor in factors) / len(factors)
    assert 0.65 < within < 0.72  # a normal value is within one deviation 68% of the time


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"order": "lifo"}, "ORDER is 'lifo': it must be one of fcfs, sjf, hrrn, edf, vtc, multi_bin"),
        ({"step_layout": "none"}, "STEP_LAYOUT is 'none'"),
        ({"length_oracle": "perfect"}, "LENGTH_ORACLE is 'perfect'"),
        ({"length_oracle": "nan"}, "LENGTH_ORACLE is 'nan'"),
        ({"edf_ttft_ms": "1,2,3"}, "three numbers with colons"),
        ({"edf_ttft_ms": "1:2:-3"}, "EDF_TTFT_MS"),
    ],
)
def test_what_cannot_work_is_named(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Policies(**settings)


def _config() -> OrderConfig:
    return OrderConfig()


def test_bins_leave_fewer_dead_rows() -> None:
    def num_dead(order: str) -> int:
        rng = random.Random(3)
        lab = VirtualLab("dynamic", policies=Policies(order=order))
        for _ in range(60):
            lab.submit(rng.choice([2, 3, 40]))
        lab.run()
        return sum(len(dead) for _, dead in lab.batches)

    assert num_dead("multi_bin") < 0.3 * num_dead("fcfs")
