"""SCHEDULING=engine through the service: the same contract, and a sentence for what it cannot do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from adapters.base import ConfigError
from adapters.registry import BACKENDS
from harness.comparing.arms import find_arms
from harness.replay.progress import make_reporter
from harness.settings import HarnessSettings
from services import main
from services.read_settings import read_settings
from tests.services.served import Served, serving, stream
from tests.services.toy_scheduling import BREAKS, DESCRIPTION


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "toy", DESCRIPTION)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(BACKEND="toy", SCHEDULING="engine", MAX_BATCH=2) as served:
        yield served


def test_answers_stream_with_usage_and_steps_are_logged(served: Served) -> None:
    frames = stream(served.url, prompt=[40, 41], max_tokens=3, stream_options={"include_usage": True})
    tokens = [i for frame in frames[:-1] for choice in frame["choices"] for i in choice["token_ids"]]
    assert tokens == [42, 43, 44]
    usage = [frame["usage"] for frame in frames[:-1] if frame.get("usage")]
    assert usage[-1]["completion_tokens"] == 3
    steps = served.get("/steps").json()["steps"]
    assert [(step["num_prompt_tokens"], step["num_decode_tokens"]) for step in steps] == [
        (2, 0),
        (0, 1),
        (0, 1),
    ]
    assert "lab_" in served.get("/metrics").text


def test_text_is_cut_at_a_stop_string(served: Served) -> None:
    answer = served.post(prompt="a", max_tokens=10, stop="e").json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == ("bcd", "stop")


def test_the_card_says_who_schedules(served: Served) -> None:
    card = served.get("/model").json()
    assert (card["variant"], card["scheduling"]) == ("continuous", "engine")
    assert card["strategy"] == {"max_batch": 2, "scheduling": "engine"}


def test_what_only_the_labs_scheduler_can_do_is_refused(served: Served) -> None:
    answer = served.post(prompt="a", priority=2)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "priority")
    assert served.post(prompt="a", priority=1, max_tokens=1).status_code == 200
    answer = served.post("/v1/generate_nobatch", prompt="a")
    assert answer.status_code == 422
    assert "runs a prompt alone" in answer.json()["error"]["message"]


def test_an_engine_that_breaks_is_started_again(served: Served) -> None:
    answer = served.post(prompt=[BREAKS], max_tokens=2)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_lost"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"BACKEND": "null"}, r"SCHEDULING=engine needs .* scheduler of its own: vllm, toy, not null"),
        ({"VARIANT": "static"}, "leaves nothing to the lab's scheduler: VARIANT must stay unset"),
        ({"PREFILL_CHUNK": "64", "BATCH_WAIT_MS": "5"}, "BATCH_WAIT_MS, PREFILL_CHUNK must stay unset"),
        ({"ORDER": "sjf", "SCHEDULE_TICK_MS": "5"}, "scheduler: SCHEDULE_TICK_MS, ORDER must stay unset"),
    ],
)
def test_settings_that_cannot_work_are_a_sentence(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings({"BACKEND": "toy", "SCHEDULING": "engine", **settings}, env_file=None)


def test_the_command_line_has_a_word_for_it() -> None:
    parser = argparse.ArgumentParser()
    main.add_arguments(parser)
    assert main.overrides(parser.parse_args(["--engine-scheduling"])) == {"scheduling": "engine"}
    assert main.overrides(parser.parse_args([])) == {}


def test_an_arm_of_a_comparison_may_ask_for_it() -> None:
    with make_reporter() as reporter:
        (arm,) = find_arms(["continuous@BACKEND=vllm,SCHEDULING=engine"], "on", HarnessSettings(), reporter)
    assert arm.name == "continuous BACKEND=vllm SCHEDULING=engine"
    assert arm.settings["SCHEDULING"] == "engine"
