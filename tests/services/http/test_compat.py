"""The other shapes of the call, each by a real `curl` command against a live server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from services.core.outputs import ChoiceOutput
from services.http.compat import EventWriter
from tests.services.served import DEADLINE_S, LabProcess, lab_serve

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def lab() -> Iterator[LabProcess]:
    with lab_serve(MAX_BATCH=4, NULL_STEP_MS=2) as lab:
        lab.wait_ready()
        yield lab


def curl(lab: LabProcess, path: str, *options: str, **fields: Any) -> tuple[int, str]:
    """Status and body of a POST."""
    command = [
        "curl",
        "-sS",
        "-N",
        "-w",
        "\n%{http_code}",
        *options,
        "-d",
        json.dumps(fields),
        lab.url + path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def read_events(body: str) -> tuple[float, str, dict[str, Any]]:
    """Seconds to the first token, the text, and what the last event says."""
    events = body.removesuffix("\n\n").split("\n\n")
    assert events[0].startswith("event: ttft\ndata: ")
    assert events[-1].startswith("event: done\ndata: ")
    text = "".join(
        "\n".join(line.removeprefix("data: ") for line in event.split("\n")) for event in events[1:-1]
    )
    return float(events[0].split("data: ")[1]), text, json.loads(events[-1].split("data: ")[1])


def expected(lab: LabProcess, **fields: Any) -> str:
    _, body = curl(lab, "/generate", **fields)
    text: str = json.loads(body)["choices"][0]["text"]
    return text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/generate", {"prompt": "hi", "max_new_tokens": 12}),
        ("/v1/generate", {"prompt": "hi", "max_tokens": 12, "stream": True}),
        ("/generate_stream", {"prompt": "hi", "max_new_tokens": 12}),
        ("/generate_stream", {"prompt": "hi", "max_tokens": 12, "priority": 2}),
    ],
)
def test_events(lab: LabProcess, path: str, fields: dict[str, Any]) -> None:
    status, body = curl(lab, path, **fields)
    assert status == 200
    ttft_s, text, done = read_events(body)
    assert 0 < ttft_s < DEADLINE_S
    assert text == expected(lab, prompt="hi", max_tokens=12)
    assert done == {"tokens_generated": 12, "finish_reason": "length"}


def test_nothing_telling_streams(lab: LabProcess) -> None:
    status, body = curl(lab, "/v1/generate", prompt="hi")
    assert status == 200
    assert read_events(body)[2]["tokens_generated"] == 128


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 12}, {"priority": 1, "max_new_tokens": 12}, {"max_new_tokens": 12, "stream": False}],
)
def test_one_object(lab: LabProcess, fields: dict[str, Any]) -> None:
    status, body = curl(lab, "/v1/generate", "-H", "X-Request-ID: r-5", prompt="hi", **fields)
    answer = json.loads(body)
    assert status == 200
    assert answer.keys() == {"request_id", "text", "tokens_generated", "latency_ms", "batch_wait_ms"}
    assert (answer["request_id"], answer["tokens_generated"]) == ("r-5", 12)
    assert answer["text"] == expected(lab, prompt="hi", max_tokens=12)
    assert answer["latency_ms"] >= 12 * 2
    assert answer["batch_wait_ms"] >= 0


@pytest.mark.parametrize("path", ["/v1/generate_nobatch", "/basic_generate"])
def test_text_alone(lab: LabProcess, path: str) -> None:
    status, body = curl(lab, path, prompt="hi", max_new_tokens=12)
    assert (status, json.loads(body)) == (200, {"text": expected(lab, prompt="hi", max_tokens=12)})


def test_nobatch_shares_no_step(lab: LabProcess) -> None:
    command = ["curl", "-sS", "-d", '{"prompt": "x", "max_tokens": 50, "ignore_eos": true}']
    after = json.loads(subprocess.check_output(["curl", "-sS", lab.url + "/steps"]))["next"]
    paths = ["/generate", "/v1/generate_nobatch", "/v1/generate_nobatch", "/generate", "/generate"]
    running = [subprocess.Popen([*command, lab.url + path], stdout=subprocess.DEVNULL) for path in paths]
    assert [process.wait(DEADLINE_S) for process in running] == [0] * 5
    steps = json.loads(subprocess.check_output(["curl", "-sS", f"{lab.url}/steps?after={after}"]))["steps"]
    assert sum(step["num_rows"] for step in steps) == 250
    assert sum(step["num_rows"] == 1 for step in steps) >= 100


def test_vllm_s_shape_says_what_is_missing(lab: LabProcess) -> None:
    fields = {"prompts": ["a", "b"], "max_tokens": 3, "ignore_eos": True}
    status, body = curl(lab, "/generate_vllm", **fields)
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (501, "backend_not_loaded")
    assert "BACKEND=null is loaded, not vllm" in error["message"]
    for path in ("/generate", "/v1/completions"):
        assert path in error["message"]
        status, body = curl(lab, path, **fields)
        assert (status, len(json.loads(body)["choices"])) == (200, 2)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/generate", {"prompt": ["a", "b"]}, "prompt"),
        ("/v1/generate", {"prompt": "a", "n": 2}, "prompt"),
        ("/v1/generate", {"max_tokens": 5}, "prompt"),
        ("/basic_generate", {"prompt": "a", "stream": True}, "stream"),
        ("/generate_stream", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_fields_are_named(lab: LabProcess, path: str, fields: dict[str, Any], param: str) -> None:
    status, body = curl(lab, path, **fields)
    assert (status, json.loads(body)["error"]["param"]) == (422, param)


def test_line_breaks_in_the_text_stay_inside_one_event() -> None:
    frame = EventWriter("r", 0.0).frame([ChoiceOutput(0, "a\nb\r\n\nc", [1])]).decode()
    assert frame.split("\n\n")[1] == "data: a\ndata: b\ndata: \ndata: c"
