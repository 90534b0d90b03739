"""A chat template is a program of somebody else's: what it does wrong stops that chat, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from adapters.text.chat_template import ChatTemplate
from adapters.text.render_process import RENDERER
from adapters.text.tokenizer import HFTokenizer
from services.core import inputs, service
from tests.services.core.test_long_texts import bytes_bpe
from tests.services.http.test_app import Background
from tests.services.served import Served, serving

WITHOUT_END = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
FOR_SOME = "{% if messages[0].content == 'loop' %}" + WITHOUT_END + "{% endif %}{{ messages[0].content }}"


@pytest.fixture
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """With the test's parameter as the model's template, and a second for each chat."""
    template = ChatTemplate(request.param, {})
    tokenizer = HFTokenizer(bytes_bpe(), chat_template=template)
    monkeypatch.setattr(service, "load_tokenizer", lambda config: tokenizer)
    monkeypatch.setattr(RENDERER, "_timeout_s", 1.0)
    RENDERER.close()
    with serving() as served:
        yield served
    RENDERER.close()


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 1, **fields}


@pytest.mark.parametrize("served", [FOR_SOME], indirect=True)
def test_a_chat_that_is_rendered_for_ever_stops_nobody(served: Served) -> None:
    asked = Background(served, path="/v1/chat/completions", **chat("loop"))
    for _ in range(20):  # the second that the template gets is not over
        assert served.get("/health").status_code == 200
        assert served.post(prompt="hello", max_tokens=1).status_code == 200
    answer = asked.answer()
    assert answer.status_code == 422
    assert "chat template does not end within 1 s" in answer.json()["error"]["message"]
    assert served.post("/v1/chat/completions", **chat("hello")).status_code == 200


@pytest.mark.parametrize("served", [FOR_SOME], indirect=True)
def test_chats_do_not_wait_for_ever_behind_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.post("/v1/chat/completions", **chat("hello")).status_code == 200  # the process has started
    monkeypatch.setattr(inputs, "RENDER_WAIT_S", 0.3)
    asked = [Background(served, path="/v1/chat/completions", **chat("loop")) for _ in range(4)]
    assert sorted(background.answer().status_code for background in asked) == [422, 429, 429, 429]


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ("{% unknown %}", "cannot be compiled"),
        ("{{ messages | nosuchfilter }}", "cannot be compiled"),
        ("{{ '{} {}'.format('a') }}", "IndexError"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ 'x' * 10 ** 10 }}", "MemoryError"),
        (WITHOUT_END, "does not end within 1 s"),
    ],
    indirect=["served"],
)
def test_a_template_that_fails_stops_chat_alone(served: Served, said: str) -> None:
    answer = served.post("/v1/chat/completions", **chat("hello"))
    assert answer.status_code == 422
    assert said in answer.json()["error"]["message"]
    assert "template" in answer.json()["error"]["message"]
    assert served.post(prompt="hello", max_tokens=1).status_code == 200


@pytest.mark.parametrize("served", ["{{ content | tojson(separators=(',', ':')) | length }}"], indirect=True)
def test_large_options_are_rendered_too(served: Served) -> None:
    options = {"content": ["x" * 100] * 10_000}
    answer = served.post("/v1/chat/completions", **chat("hello", chat_template_kwargs=options))
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == len("1030001")
