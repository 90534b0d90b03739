"""The clients of the engine, what happens when the engine is lost, and how the service starts and ends."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing.context
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import httpx
import psutil
import pytest

from adapters.base import BackendConfig, BackendError, BackendInfo, LabError, SamplingParams, Sequence
from adapters.null_backend import NullBackend
from services.engine.message_loop import Message
from services.engine.messages import (
    EngineFailed,
    Ready,
    SequenceTimings,
    SequenceUpdate,
    StepRecord,
    StepReport,
    Submit,
)
from services.engine.spec import EngineSpec
from services.engine_client import supervisor as supervisor_module
from services.engine_client.client import STOP_WITHIN_S, MakeClient, OnLost, OnReport
from services.engine_client.process import EngineProcess
from services.engine_client.supervisor import FAILED_AFTER, Supervisor
from services.engine_client.thread import EngineThread
from services.engine_client.wire import pack, unpack
from tests.services.scripted_engine import ScriptedEngine
from tests.services.served import CLIENT, DEADLINE_S, LabProcess, events, lab_serve, serving, until
from tools import cli

NULL = EngineSpec("continuous", BackendConfig(backend="null", num_threads=1))


@pytest.mark.parametrize(
    "message",
    [
        Ready(NullBackend(NULL.backend).info),
        EngineFailed("why"),
        StepReport(),
        StepReport(
            [
                SequenceUpdate(7, [1, 2]),
                SequenceUpdate(8, [], "length", SequenceTimings(0.1, 0.2, 0.3, 0.4, 5, 6.5)),
                SequenceUpdate(9, [], "error", None, "why"),
            ],
            StepRecord(3, 1.5, 0.25, 3, 4, 2, 1, 9),
            num_running=3,
            queue_depth=9,
            kv_used_tokens=77,
            prefilling_seq_ids=[9, 10],
            figures={"preemptions": 2},
        ),
    ],
)
def test_messages_arrive_as_they_were_sent(message: Ready | EngineFailed | StepReport) -> None:
    assert unpack(pack(message)) == message


@pytest.mark.parametrize("make_client", [EngineProcess, EngineThread])
def test_a_client_answers_and_ends(make_client: MakeClient) -> None:
    async def scenario() -> None:
        tokens: list[int] = []
        done = asyncio.Event()

        def on_report(report: StepReport) -> None:
            for update in report.updates:
                tokens.extend(update.token_ids)
                if update.finish_reason:
                    done.set()

        client = make_client(NULL, on_report, pytest.fail)
        assert (await client.start()).backend == "null"
        client.send(Submit([Sequence(1, [97], SamplingParams(max_tokens=5, ignore_eos=True))]))
        await asyncio.wait_for(done.wait(), DEADLINE_S)
        assert len(tokens) == 5
        await client.close()
        if isinstance(client, EngineProcess):
            assert client.pid is not None
            assert not psutil.pid_exists(client.pid)

    asyncio.run(scenario())


def test_an_engine_that_is_still_loading_is_ended_at_once() -> None:
    async def scenario() -> None:
        client = EngineProcess(NULL, lambda report: None, pytest.fail)
        starting = asyncio.create_task(client.start())
        await asyncio.sleep(0)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await asyncio.sleep(0.05)
        starting.cancel()
        await asyncio.wait([starting])
        begin_s = time.monotonic()
        await client.close()
        assert time.monotonic() - begin_s < STOP_WITHIN_S / 2
        assert not psutil.pid_exists(client.pid)

    asyncio.run(scenario())


@pytest.mark.parametrize("make_client", [EngineProcess, EngineThread])
def test_a_model_that_cannot_be_loaded_says_why(make_client: MakeClient) -> None:
    async def scenario() -> None:
        spec = EngineSpec("continuous", BackendConfig(backend="nowhere", num_threads=1))
        client = make_client(spec, lambda report: None, pytest.fail)
        with pytest.raises(LabError, match="BACKEND must be one of"):
            await client.start()
        await client.close()

    asyncio.run(scenario())


class FlakyClient:
    """A client whose starts go as planned: each entry of `plan` says whether one works, or what it raises."""

    def __init__(self, plan: list[bool | Exception]) -> None:
        self.plan = plan
        self.on_lost: OnLost = pytest.fail
        self.sent: list[Message] = []

    def __call__(self, spec: EngineSpec, on_report: OnReport, on_lost: OnLost) -> FlakyClient:
        self.on_lost = on_lost
        return self

    async def start(self) -> BackendInfo:
        entry = self.plan.pop(0)
        if isinstance(entry, Exception):
            raise entry
        if not entry:
            raise BackendError("no memory")
        return NullBackend(NULL.backend).info

    def send(self, message: Message) -> None:
        self.sent.append(message)

    async def close(self) -> None:
        self.sent.clear()


def test_the_supervisor_tries_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_S", 0.0)

    async def scenario() -> None:
        client = FlakyClient([True, *[False] * FAILED_AFTER, True])
        states: list[str] = []
        losses: list[str] = []
        is_back = asyncio.Event()

        def make(spec: EngineSpec, on_report: OnReport, on_lost: OnLost) -> FlakyClient:
            states.append(supervisor.state)
            return client(spec, on_report, on_lost)

        supervisor = Supervisor(NULL, make, lambda report: None, losses.append, is_back.set)
        await supervisor.start()
        client.on_lost("gone")
        assert supervisor.state == "restarting"
        await asyncio.wait_for(is_back.wait(), DEADLINE_S)
        assert (losses, supervisor.state) == (["gone"], "running")
        assert states == ["starting", *["restarting"] * (FAILED_AFTER - 1), "failed", "failed"]
        await supervisor.close()
        client.on_lost("closed on purpose")
        assert losses == ["gone"]

    asyncio.run(scenario())


def test_a_restart_may_fail_for_any_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_S", 0.0)

    async def scenario() -> None:
        no_process = OSError(errno.EAGAIN, "no process is left")
        client = FlakyClient([True, no_process, True])
        is_back = asyncio.Event()
        supervisor = Supervisor(NULL, client, lambda report: None, lambda reason: None, is_back.set)
        await supervisor.start()
        client.on_lost("gone")
        await asyncio.wait_for(is_back.wait(), DEADLINE_S)
        assert supervisor.state == "running"
        await supervisor.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("num_losses", "pause_s"), [(1, 0.2), (3, 0.8), (10, 30.0), (10_000, 30.0)])
def test_pauses_grow_up_to_a_limit(num_losses: int, pause_s: float) -> None:
    assert supervisor_module._pause_s(num_losses) == pytest.approx(pause_s)


def test_a_process_that_cannot_be_started_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: Any) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "_Popen", staticmethod(refuse))

    async def scenario() -> None:
        client = EngineProcess(NULL, lambda report: None, pytest.fail)
        with pytest.raises(OSError, match="no memory"):
            await client.start()
        await client.close()

    asyncio.run(scenario())


def test_a_first_start_that_fails_is_not_repeated() -> None:
    async def scenario() -> None:
        supervisor = Supervisor(
            NULL, FlakyClient([False, True]), lambda report: None, pytest.fail, pytest.fail
        )
        with pytest.raises(BackendError, match="no memory"):
            await supervisor.start()
        assert supervisor.state == "failed"

    asyncio.run(scenario())


def test_requests_in_flight_end_when_the_engine_is_lost() -> None:
    engine = ScriptedEngine()
    with serving(engine) as served:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(served.post(prompt="a")))
        thread.start()
        until(lambda: len(engine.submitted) == 1)
        served.call(lambda: engine.on_lost("it fell"))
        thread.join(DEADLINE_S)
        error = answers[0].json()["error"]
        assert (answers[0].status_code, error["code"]) == (503, "engine_lost")
        assert "it fell" in error["message"]
        until(lambda: served.get("/health").json()["status"] == "ok")


@contextmanager
def open_stream(lab: LabProcess, **fields: Any) -> Iterator[Iterator[str]]:
    """A stream whose first frame has come; yields the rest as text pieces."""
    fields = {"prompt": "a", "ignore_eos": True, "stream": True, **fields}
    with CLIENT.stream("POST", lab.url + "/generate", json=fields) as answer:
        assert answer.status_code == 200
        pieces = answer.iter_text()
        first = next(pieces)
        yield chain([first], pieces)


def engine_pid(lab: LabProcess) -> int:
    children = psutil.Process(lab.process.pid).children(recursive=True)
    (pid,) = (child.pid for child in children if "spawn_main" in " ".join(child.cmdline()))
    return pid


def last_event(pieces: Iterator[str]) -> Any:
    return events("".join(pieces))[-1]


def test_a_killed_engine_ends_its_streams_and_comes_back() -> None:
    with lab_serve(NULL_STEP_MS=5) as lab:
        lab.wait_ready()
        killed = engine_pid(lab)
        with open_stream(lab, max_tokens=3000) as pieces:
            os.kill(killed, signal.SIGKILL)
            error = last_event(pieces)["error"]
        assert error["code"] == "engine_lost"
        assert "SIGKILL" in error["message"]
        lab.wait_ready()
        assert engine_pid(lab) != killed
        answer = CLIENT.post(lab.url + "/generate", json={"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
        assert 'lab_worker_restarts_total{backend="null",model="null",strategy="continuous"} 1.0' in (
            CLIENT.get(lab.url + "/metrics").text
        )
        lab.process.terminate()
        assert lab.process.wait(DEADLINE_S) == 0


def test_the_engine_ends_with_a_service_that_is_killed() -> None:
    with lab_serve(NULL_STEP_MS=5) as lab:
        lab.wait_ready()
        engine = psutil.Process(engine_pid(lab))
        with open_stream(lab, max_tokens=3000):
            lab.process.kill()
            engine.wait(DEADLINE_S)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal for a parent's death")
def test_a_stopped_engine_ends_with_a_service_that_is_killed() -> None:
    with lab_serve() as lab:
        lab.wait_ready()
        pid = engine_pid(lab)
        os.kill(pid, signal.SIGSTOP)
        lab.process.kill()
        until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_sigterm_finishes_what_was_accepted() -> None:
    with lab_serve(NULL_STEP_MS=5, MAX_BATCH=1) as lab:
        lab.wait_ready()
        queued: list[httpx.Response] = []
        fields = {"prompt": "b", "max_tokens": 3, "ignore_eos": True}
        thread = threading.Thread(
            target=lambda: queued.append(CLIENT.post(lab.url + "/generate", json=fields))
        )
        with open_stream(lab, max_tokens=80) as pieces:
            thread.start()
            until(lambda: CLIENT.get(lab.url + "/health").json()["queue_depth"] == 1)
            lab.process.send_signal(signal.SIGTERM)
            until(lambda: lab.status() == "draining")
            refused = CLIENT.post(lab.url + "/generate", json=fields)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert last_event(pieces) == "[DONE]"
        thread.join(DEADLINE_S)
        assert queued[0].json()["choices"][0]["num_output_tokens"] == 3
        assert lab.process.wait(DEADLINE_S) == 0


def test_a_second_signal_ends_everything_at_once() -> None:
    with lab_serve(NULL_STEP_MS=50) as lab:
        lab.wait_ready()
        with open_stream(lab, max_tokens=4000) as pieces:
            lab.process.send_signal(signal.SIGINT)
            until(lambda: lab.status() == "draining")
            lab.process.send_signal(signal.SIGTERM)
            assert last_event(pieces)["error"]["code"] == "draining"
        assert lab.process.wait(DEADLINE_S) == 1


def test_draining_has_an_end() -> None:
    with lab_serve(NULL_STEP_MS=50, DRAIN_TIMEOUT_S=0.2) as lab:
        lab.wait_ready()
        with open_stream(lab, max_tokens=4000) as pieces:
            lab.process.terminate()
            assert last_event(pieces)["error"]["code"] == "draining"
        assert lab.process.wait(DEADLINE_S) == 1


def test_a_port_in_use_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--backend=null", f"--port={port}"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert f"127.0.0.1:{port}" in complaint
    assert "another PORT" in complaint


@pytest.mark.parametrize("host", ["300.1.1.1", "a..b", "203.0.113.1"])
def test_an_address_that_is_not_ours_is_one_sentence(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--backend=null", f"--host={host}", "--port=8000"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert f"{host}:8000" in complaint
    assert "HOST" in complaint
    assert "PORT" not in complaint


@pytest.mark.parametrize(
    ("argument", "named"),
    [("--variant=statik", "VARIANT"), ("--set=MAX_BACTH=2", "MAX_BATCH"), ("--set=PORT", "NAME=VALUE")],
)
def test_a_wrong_setting_is_one_sentence(
    argument: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", argument]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert named in complaint


def test_a_model_that_is_not_there_is_one_sentence() -> None:
    with lab_serve("--model=./no/such/folder", BACKEND="torch") as lab:
        _, complaint = lab.process.communicate(timeout=60)
    assert lab.process.returncode == 2
    assert "Traceback" not in complaint
    assert len([line for line in complaint.splitlines() if " ERROR " in line]) == 1
