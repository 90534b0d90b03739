"""The key, the request id, the log lines, and that secrets stay out of them."""

from __future__ import annotations

import io
import json
import logging
import signal
from typing import Any

import pytest

from adapters.base import ConfigError
from services.engine.messages import SequenceUpdate
from services.logs import set_up_logs
from services.read_settings import read_settings
from tests.services.http.test_app import Background
from tests.services.scripted_engine import TIMINGS, ScriptedEngine, last
from tests.services.served import CLIENT, DEADLINE_S, lab_serve, serving, until

KEY = "not-a-real-key"


def test_a_key_opens_and_health_needs_none() -> None:
    with serving(API_KEY=KEY) as served:
        assert served.get("/health").status_code == 200
        for path in ("/model", "/metrics", "/v1/models", "/steps", "/nothing"):
            answer = served.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for wrong in ("", "Bearer", f"Bearer {KEY}x", f"bearer {KEY}", KEY, "Bearer \u00e9"):
            answer = CLIENT.post(
                served.url + "/generate",
                json={"prompt": "a"},
                headers={"authorization": wrong.encode()},  # type: ignore[dict-item]
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert KEY not in answer.text
        right = {"authorization": f"Bearer {KEY}"}
        answer = CLIENT.post(served.url + "/generate", json={"prompt": "a", "max_tokens": 1}, headers=right)
        assert answer.status_code == 200
        assert "api_key" not in CLIENT.get(served.url + "/model", headers=right).json()["settings"]


def test_the_id_comes_back_from_wherever_it_came() -> None:
    with serving() as served:

        def ids(header: str | None = None, **fields: Any) -> tuple[str, str]:
            headers = {} if header is None else {"x-request-id": header}
            fields = {"prompt": "a", "max_tokens": 1, **fields}
            answer = CLIENT.post(served.url + "/generate", json=fields, headers=headers)
            return answer.headers["x-request-id"], answer.json().get("id", "")

        assert ids("mine-7") == ("mine-7", "mine-7")
        assert ids("mine-7", request_id="body-8") == ("body-8", "body-8")
        assert ids("mine-7", max_tokens=-1)[0] == "mine-7"
        for unusable in (None, "two words", "x" * 129, ""):
            in_header, in_body = ids(unusable)
            assert in_header == in_body
            assert in_body.startswith("cmpl-")
        assert served.get("/health").headers["x-request-id"]
        assert served.get("/nothing").headers["x-request-id"]


def test_a_cancel_by_id_ends_running_and_queued_with_what_they_have() -> None:
    engine = ScriptedEngine()
    with serving(engine) as served:
        request = Background(served, prompt=["ab", "c"], request_id="r-1")
        until(lambda: len(engine.submitted) == 2)
        first, second = (seq.seq_id for seq in engine.submitted)
        served.call(lambda: engine.step(last(second, [98])))
        answer = CLIENT.delete(served.url + "/requests/r-1")
        assert (answer.status_code, answer.json()) == (200, {"request_id": "r-1", "num_prompts": 1})
        assert engine.cancelled == [first]
        missing = CLIENT.delete(served.url + "/requests/r-2")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")

        served.call(lambda: engine.step(SequenceUpdate(first, [], "abort", TIMINGS)))
        choices = request.answer().json()["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["abort", "length"]
        assert 'lab_requests_cancelled_total{backend="null",model="null",strategy="continuous"} 1.0' in (
            served.get("/metrics").text
        )


@pytest.mark.parametrize("streams", [True, False])
def test_a_cancel_by_id_reaches_a_real_engine(streams: bool) -> None:
    with serving(MAX_BATCH=1, MAX_MODEL_LEN=100_000, NULL_STEP_MS=2) as served:
        fields = {"max_tokens": 90_000, "ignore_eos": True, "stream": streams}
        running = Background(served, prompt="a", request_id="running", **fields)
        until(lambda: served.get("/steps").json()["next"] > 3)
        queued = Background(served, prompt="b", request_id="queued", **fields)
        until(lambda: served.get("/health").json()["queue_depth"] == 1)
        for name, request in (("queued", queued), ("running", running)):
            assert CLIENT.delete(f"{served.url}/requests/{name}").status_code == 200
            answer = request.answer()
            assert answer.status_code == 200
            assert '"finish_reason":"abort"' in answer.text
            assert not streams or answer.text.endswith("data: [DONE]\n\n")
        assert served.get("/health").json()["active_requests"] == 0


def test_json_lines_carry_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    try:
        set_up_logs("INFO", "json", process="engine")
        logging.getLogger("x").info("it is %d", 5, extra={"fields": {"request_id": "r-1"}})
        try:
            raise ValueError("broken\nin two")
        except ValueError:
            logging.getLogger("x").exception("failed")
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["it is 5", "failed"]
    assert (lines[0]["request_id"], lines[0]["process"], lines[0]["level"]) == ("r-1", "engine", "INFO")
    assert "ValueError: broken" in lines[1]["exception"]


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_path_forges_no_log_line(log_format: str) -> None:
    with lab_serve(LOG_FORMAT=log_format) as lab:
        lab.wait_ready()
        forged = "/x%0a2026-01-01%20ERROR%20forged%1b[31m%c2%85%e2%80%a8"
        assert CLIENT.get(lab.url + forged, headers={"x-request-id": "r-9"}).status_code == 404
        lab.process.send_signal(signal.SIGTERM)
        _, log = lab.process.communicate(timeout=DEADLINE_S)
    (line,) = [line for line in log.splitlines() if "forged" in line]
    assert "r-9" in line
    assert "\\n2026-01-01 ERROR" in line or "\\u000a" in line
    assert line.isprintable()


def test_a_service_logs_its_settings_once_and_each_request() -> None:
    with lab_serve(LOG_FORMAT="json", API_KEY=KEY) as lab:
        lab.wait_ready()
        answer = CLIENT.post(
            lab.url + "/generate",
            json={"prompt": "a", "max_tokens": 1},
            headers={"authorization": f"Bearer {KEY}", "x-request-id": "r-9"},
        )
        assert answer.status_code == 200
        lab.process.send_signal(signal.SIGTERM)
        _, log = lab.process.communicate(timeout=DEADLINE_S)
    lines = [json.loads(line) for line in log.splitlines()]
    (settings,) = [line for line in lines if line["message"] == "settings"]
    assert (settings["variant"], settings["api_key"]) == ("continuous", "***")
    (request,) = [line for line in lines if line.get("request_id") == "r-9"]
    assert (request["method"], request["path"], request["status"]) == ("POST", "/generate", 200)
    assert request["duration_ms"] > 0
    assert KEY not in log


def test_a_bad_key_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="API_KEY") as error:
        read_settings({"API_KEY": "short"}, env_file=None)
    assert "short" not in str(error.value).replace("shorter", "")
