"""A request that the engine was lost with twice in a row is kept away from the next one."""

from __future__ import annotations

from services.core.loss_record import REFUSED_FOR_S, LossRecord
from tests.services.http.test_app import Background
from tests.services.scripted_engine import ScriptedEngine, last
from tests.services.served import serving, until
from tests.services.virtual_time import Clock


def test_two_losses_in_a_row_keep_a_request_away_for_a_while() -> None:
    clock = Clock()
    record = LossRecord(clock)
    record.lost({1, 2})
    assert record.refused_for_s(1) == 0
    record.lost({2, 3})
    assert [record.refused_for_s(n) for n in (1, 2, 3)] == [0, REFUSED_FOR_S, 0]
    clock.now_s += REFUSED_FOR_S - 1
    record.lost({3})
    assert [record.refused_for_s(n) for n in (1, 2, 3)] == [0, 1, REFUSED_FOR_S]
    clock.now_s += 1
    assert record.refused_for_s(2) == 0


def test_losses_far_apart_are_not_in_a_row() -> None:
    clock = Clock()
    record = LossRecord(clock)
    for _ in range(3):
        record.lost({1})
        clock.now_s += REFUSED_FOR_S + 1
    assert record.refused_for_s(1) == 0


def test_the_client_is_told_and_others_are_served() -> None:
    engine = ScriptedEngine()
    with serving(engine) as served:
        for num_losses in (1, 2):
            culprit = Background(served, prompt="culprit", seed=num_losses)
            other = Background(served, prompt=f"other {num_losses}")
            until(lambda: len(engine.submitted) == 2)
            served.call(lambda: engine.on_lost("it fell"))
            assert {request.answer().json()["error"]["code"] for request in (culprit, other)} == {
                "engine_lost"
            }
            until(lambda: served.service.status == "ok")

        refused = served.post(prompt="culprit")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "engine_lost_twice")
        assert 0 < int(refused.headers["retry-after"]) <= REFUSED_FOR_S
        good = Background(served, prompt="other 2")
        until(lambda: len(engine.submitted) == 1)
        served.call(lambda: engine.step(last(engine.submitted[0].seq_id, [97])))
        assert good.answer().status_code == 200
