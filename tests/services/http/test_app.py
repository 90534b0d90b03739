"""The routes over real sockets, with the null backend or a scripted engine behind them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from services.contract.responses import ChatCompletion, Completion, CompletionChoice
from services.contract.status import Health, ModelCard, ModelList, Steps
from services.engine.messages import SequenceUpdate
from tests.services.scripted_engine import ScriptedEngine, last
from tests.services.served import DEADLINE_S, Served, serving, until


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(MAX_BATCH=4, MAX_MODEL_LEN=200) as served:
        yield served


def choices(served: Served, **fields: Any) -> list[CompletionChoice]:
    answer = served.post(**fields)
    assert answer.status_code == 200, answer.text
    return Completion.model_validate(answer.json(), strict=True).choices


def test_health(served: Served) -> None:
    answer = served.get("/health")
    assert answer.status_code == 200
    Health.model_validate(answer.json(), strict=True)
    assert answer.json()["worker"] == "in_process"


def test_model(served: Served) -> None:
    card = ModelCard.model_validate(served.get("/model").json(), strict=True)
    assert (card.model, card.backend, card.variant, card.max_model_len) == ("null", "null", "continuous", 200)
    assert card.strategy == {
        "max_batch": 4,
        "batch_wait_ms": 50.0,
        "pad_finished": False,
        "long_prefill_token_threshold": 0,
        "order": "fcfs",
        "admission": "all",
        "step_layout": "decode_first",
        "kv_policy": "reserve",
        "priority_preemption": False,
        "prefix_cache": False,
    }
    assert (card.client_chunk, card.max_queue, card.eos_token_ids) == (1, 256, [256])
    assert card.settings["max_step_tokens"] == 512
    assert "host" not in card.settings


def test_static_asks_for_its_prompts_in_chunks() -> None:
    with serving(VARIANT="static_batch", MAX_BATCH=8) as served:
        card = served.get("/model").json()
        assert (card["variant"], card["client_chunk"], card["strategy"]["pad_finished"]) == (
            "static",
            8,
            True,
        )


def test_models_in_the_openai_shape(served: Served) -> None:
    models = ModelList.model_validate(served.get("/v1/models").json(), strict=True)
    assert [entry.id for entry in models.data] == ["null"]
    assert choices(served, prompt="a", max_tokens=1, model="null")


def test_both_paths_are_one_call(served: Served) -> None:
    fields = {"prompt": "same", "max_tokens": 20}
    ours, theirs = (served.post(path, **fields).json() for path in ("/generate", "/v1/completions"))
    assert ours["choices"][0]["token_ids"] == theirs["choices"][0]["token_ids"]
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]


def test_prompts_have_budgets_and_seeds_of_their_own(served: Served) -> None:
    sampled = {"temperature": 1.0, "ignore_eos": True}
    together = choices(served, prompt=["a", "a", "a"], max_tokens=[5, 9, 5], seed=[1, 2, 1], **sampled)
    assert [choice.num_output_tokens for choice in together] == [5, 9, 5]
    assert together[0].token_ids == together[2].token_ids
    assert together[0].token_ids != together[1].token_ids[:5]
    (alone,) = choices(served, prompt="a", max_tokens=9, seed=2, **sampled)
    assert alone.token_ids == together[1].token_ids


def test_a_prompt_may_be_token_ids(served: Served) -> None:
    (text,), (ids,) = (choices(served, prompt=prompt, max_tokens=9) for prompt in ("ab", [97, 98]))
    assert text.token_ids == ids.token_ids


def test_usage_adds_up(served: Served) -> None:
    answer = served.post(prompt=["a", "bcd"], max_tokens=[2, 5], ignore_eos=True).json()
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 7, "total_tokens": 11}


def test_a_budget_that_nobody_asked_for_shrinks_to_what_fits(served: Served) -> None:
    (choice,) = choices(served, prompt="a" * 190, ignore_eos=True)
    assert (choice.num_output_tokens, choice.finish_reason) == (10, "length")


def test_long_texts_and_large_bodies_take_the_same_way() -> None:
    with serving(MAX_MODEL_LEN=200_000, MAX_STEP_TOKENS=200_000) as served:
        (choice,) = choices(served, prompt="a" * 100_000, max_tokens=1)
        assert choice.num_prompt_tokens == 100_000


def test_chat(served: Served) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = served.post("/v1/chat/completions", messages=messages, max_completion_tokens=4, ignore_eos=True)
    completion = ChatCompletion.model_validate(answer.json(), strict=True)
    (prompted,) = choices(served, prompt="user: hi\nassistant: ", max_tokens=4, ignore_eos=True)
    assert completion.choices[0].message.content == prompted.text
    assert completion.id.startswith("chatcmpl-")


def test_prompts_may_be_messages_of_a_chat(served: Served) -> None:
    def num_tokens(**fields: Any) -> list[int]:
        choices = served.post(max_tokens=1, **fields).json()["choices"]
        return [choice["num_prompt_tokens"] for choice in choices]

    chat = served.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], max_tokens=1
    ).json()["usage"]["prompt_tokens"]
    assert num_tokens(prompt=["Hello", "Hello!"], chat=True) == [chat, chat + 1]
    assert num_tokens(prompt="Hello", chat=False) == num_tokens(prompt="Hello") != [chat]
    hello = [{"role": "user", "content": "Hello"}]
    turns = [*hello, {"role": "assistant", "content": "Hi"}, *hello]
    assert num_tokens(messages=hello) == [chat]
    assert num_tokens(messages=[hello, turns]) == [chat, 2 * chat + len("Hi\n")]
    refused = served.post(prompt=[1, 2], chat=True, max_tokens=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "chat")


def test_steps_go_on_from_where_one_asked(served: Served) -> None:
    first = Steps.model_validate(served.get("/steps").json(), strict=True)
    assert [step.step for step in first.steps] == list(range(first.next))
    served.post(prompt="abc", max_tokens=3, ignore_eos=True)
    steps = Steps.model_validate(served.get(f"/steps?after={first.next}").json(), strict=True)
    assert [(step.num_prompt_tokens, step.num_decode_tokens) for step in steps.steps] == [
        (3, 0),
        (0, 1),
        (0, 1),
    ]
    assert (steps.next, steps.num_dropped) == (first.next + 3, 0)
    for far in (steps.next + 5, 2**63 - 1):
        assert served.get(f"/steps?after={far}").json()["steps"] == []
    assert served.get(f"/steps?after={2**63}").status_code == 422


def test_the_schema_knows_every_model(served: Served) -> None:
    schema = served.get("/openapi.json").json()
    models = schema["components"]["schemas"]
    assert {"GenerateRequest", "ChatRequest", "StreamChunk", "Completion", "ErrorBody"} <= set(models)
    body = schema["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].rsplit("/", 1)[1] in models
    assert served.get("/docs").status_code == 200


def test_while_the_model_loads() -> None:
    with serving(load=False) as served:
        health = served.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["worker"]) == (
            503,
            "starting",
            "starting",
        )
        for answer in (served.post(prompt="a"), served.get("/model"), served.get("/v1/models")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "starting")
        assert health.json()["gpu_utilization"] is None or health.json()["gpu_utilization"] <= 1
        page = served.get("/metrics").text
        assert 'lab_ready{backend="null",model="null",strategy="continuous"} 0.0' in page
        assert served.post(prompt=5).status_code == 422


class Background:
    """A request that is on its way in a thread."""

    def __init__(self, served: Served, **fields: Any) -> None:
        self._answers: list[httpx.Response] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(served.post(**fields)))
        self._thread.start()

    def answer(self) -> httpx.Response:
        self._thread.join(DEADLINE_S)
        return self._answers[0]


def test_a_full_queue_refuses_at_once_but_names_what_never_fits() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_QUEUE=2, MAX_MODEL_LEN=100) as served:
        waiting = [Background(served, prompt="a") for _ in range(2)]
        until(lambda: len(engine.submitted) == 2)
        refused = served.post(prompt="a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert len(engine.submitted) == 2
        assert served.post(prompt="a" * 101).status_code == 400
        assert served.post(prompt=5).status_code == 422

        first, second = (seq.seq_id for seq in engine.submitted)
        served.call(lambda: engine.step(num_running=1, prefilling_seq_ids=[first]))
        third = Background(served, prompt="a")
        until(lambda: len(engine.submitted) == 3)
        served.call(lambda: engine.step(*(last(seq.seq_id, [97]) for seq in engine.submitted)))
        assert [request.answer().status_code for request in (*waiting, third)] == [200] * 3
        assert first != second


def test_a_request_past_its_time_is_cancelled_with_504() -> None:
    engine = ScriptedEngine()
    with serving(engine) as served:
        answer = served.post(prompt="a", timeout_s=0.05)
        assert (answer.status_code, answer.json()["error"]["param"]) == (504, "timeout_s")
        assert engine.cancelled == [engine.submitted[0].seq_id]
        assert served.get("/health").json()["active_requests"] == 0


def test_one_failed_prompt_ends_its_whole_request() -> None:
    engine = ScriptedEngine()
    with serving(engine) as served:
        request = Background(served, prompt=["a", "b"])
        until(lambda: len(engine.submitted) == 2)
        first, second = (seq.seq_id for seq in engine.submitted)
        served.call(lambda: engine.step(SequenceUpdate(second, [], "error", None, "broken")))
        answer = request.answer()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "backend_failed")
        assert engine.cancelled == [first]


def test_the_engine_hears_what_was_asked() -> None:
    engine = ScriptedEngine()
    with serving(engine) as served:
        fields = {
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
            "seed": 6,
            "ignore_eos": True,
        }
        request = Background(served, prompt=["ab", "c"], priority=2, **fields)
        until(lambda: len(engine.submitted) == 2)
        first, second = engine.submitted
        assert {name: getattr(first.params, name) for name in fields} == fields
        assert (first.prompt_token_ids, second.prompt_token_ids) == ([97, 98], [99])
        assert (first.priority, first.group_size, first.group_id) == (2, 2, second.group_id)
        assert first.arrival_s == second.arrival_s > 0
        served.call(lambda: engine.step(last(first.seq_id, [97]), last(second.seq_id, [97])))
        assert request.answer().status_code == 200


def test_settings_fill_in_what_a_request_leaves_out() -> None:
    engine = ScriptedEngine()
    with serving(engine, MAX_TOKENS=7, TEMPERATURE=0.5, TOP_P=0.25, TOP_K=3, SEED=11) as served:
        request = Background(served, prompt="a")
        until(lambda: len(engine.submitted) == 1)
        params = engine.submitted[0].params
        served.call(lambda: engine.step(last(engine.submitted[0].seq_id, [97])))
        assert request.answer().status_code == 200
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.seed) == (
        7,
        0.5,
        0.25,
        3,
        11,
    )
