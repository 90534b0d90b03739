"""A hung engine is told from a busy one, by the judge alone and with real processes."""

from __future__ import annotations

import os
import signal
import threading

import psutil

from services.engine_client.heartbeat import INTERVAL_S, Watch
from tests.services.engine_client.test_worker import engine_pid, last_event, open_stream
from tests.services.served import CLIENT, DEADLINE_S, LabProcess, lab_serve, until


def wait(watch: Watch, from_s: float, to_s: float) -> str | None:
    """Check at each interval; the first complaint, or None."""
    now_s = from_s
    while now_s < to_s:
        now_s += INTERVAL_S
        if wrong := watch.check(now_s):
            return wrong
    return None


def test_silence_is_a_hang() -> None:
    watch = Watch(silence_limit_s=5.0, step_limit_s=60.0, now_s=100.0)
    assert wait(watch, 100.0, 105.0) is None
    watch.heard(104.9)
    assert wait(watch, 105.0, 109.5) is None
    assert "no sign of life for 5." in (wait(watch, 109.5, 120.0) or "")


def test_a_long_step_that_beats_is_none_until_its_limit() -> None:
    watch = Watch(silence_limit_s=5.0, step_limit_s=60.0, now_s=0.0)
    for tick in range(1, 120):
        watch.heard(tick * INTERVAL_S, busy_s=tick * INTERVAL_S)
        assert watch.check(tick * INTERVAL_S) is None
    watch.heard(60.5, busy_s=60.5)
    assert "STEP_TIMEOUT_S = 60" in (watch.check(60.5) or "")


def test_the_end_of_a_step_ends_its_account() -> None:
    watch = Watch(silence_limit_s=5.0, step_limit_s=1.0, now_s=0.0)
    watch.heard(0.5, busy_s=1.5)
    watch.heard(0.5)
    assert watch.check(0.5) is None


def test_zero_is_no_limit() -> None:
    watch = Watch(silence_limit_s=0.0, step_limit_s=0.0, now_s=0.0)
    watch.heard(0.1, busy_s=1e6)
    assert wait(watch, 0.0, 100.0) is None


def test_a_check_that_was_held_up_itself_blames_nobody() -> None:
    watch = Watch(silence_limit_s=5.0, step_limit_s=60.0, now_s=0.0)
    assert watch.check(30.0) is None
    assert wait(watch, 30.0, 34.5) is None
    assert wait(watch, 34.5, 36.0) is not None


def test_a_frozen_engine_is_replaced_and_holds_up_nobody() -> None:
    with lab_serve(NULL_STEP_MS=5, HEARTBEAT_TIMEOUT_S=1.5) as lab:
        lab.wait_ready()
        frozen = engine_pid(lab)
        with open_stream(lab, max_tokens=3000) as pieces:
            os.kill(frozen, signal.SIGSTOP)
            flood = {"prompt": ["x" * 2000] * 100, "max_tokens": 1}  # more than a pipe holds
            threads = [
                threading.Thread(target=CLIENT.post, args=(lab.url + "/generate",), kwargs={"json": flood})
                for _ in range(5)
            ]
            for thread in threads:
                thread.start()
            assert CLIENT.get(lab.url + "/health", timeout=1.0).status_code == 200
            error = last_event(pieces)["error"]
        assert error["code"] == "engine_lost"
        assert "no sign of life" in error["message"]
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        lab.wait_ready()
        assert engine_pid(lab) != frozen
        lab.process.terminate()
        assert lab.process.wait(DEADLINE_S) == 0


def test_an_engine_that_is_frozen_while_it_loads_is_replaced() -> None:
    with lab_serve(NULL_STEP_MS=5, HEARTBEAT_TIMEOUT_S=1.5) as lab:
        lab.wait_ready()
        killed = engine_pid(lab)
        os.kill(killed, signal.SIGKILL)
        until(lambda: _next_engine(lab, killed) is not None)
        frozen = _next_engine(lab, killed)
        assert frozen is not None
        os.kill(frozen, signal.SIGSTOP)
        assert lab.status() == "starting"
        lab.wait_ready()
        assert engine_pid(lab) != frozen


def _next_engine(lab: LabProcess, before: int) -> int | None:
    try:
        pid = engine_pid(lab)
    except (ValueError, psutil.Error):  # in the pause there is none
        return None
    return None if pid == before else pid


def test_a_long_step_is_not_taken_for_a_hang() -> None:
    with lab_serve(NULL_PROMPT_TOKEN_MS=4, HEARTBEAT_TIMEOUT_S=1.0) as lab:
        lab.wait_ready()
        engine = engine_pid(lab)
        answer = CLIENT.post(lab.url + "/generate", json={"prompt": "x" * 500, "max_tokens": 2})
        assert answer.status_code == 200  # after a step of 2 s
        assert engine_pid(lab) == engine


def test_a_stuck_step_is_ended() -> None:
    with lab_serve(NULL_STEP_MS=3_600_000, STEP_TIMEOUT_S=1) as lab:
        lab.wait_ready()
        answer = CLIENT.post(lab.url + "/generate", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_lost")
        assert "STEP_TIMEOUT_S = 1 s" in answer.json()["error"]["message"]
        until(lambda: lab.status() in ("ok", "starting"))
