"""What a client sees of every backend alike: ends, stops, text in any script, and answers free of company."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.conformance import tiny_llama
from tests.services.served import Served, serving, stream

TEXTS = ["Hello", "naïve café", "東京 🏳️‍🌈 e\u0301", "\n\t tabs", "مرحبا"]


PARAMS = [
    "null",
    "torch",
    pytest.param("llama_cpp", marks=pytest.mark.llama),
    pytest.param("openvino", marks=pytest.mark.engines),
    pytest.param("onnx", marks=pytest.mark.engines),
    pytest.param("mlx", marks=pytest.mark.engines),
    pytest.param("vllm", marks=pytest.mark.engines),
    pytest.param("vllm, own scheduling", marks=pytest.mark.engines),
]


PACKAGES = {
    "llama_cpp": ("llama_cpp",),
    "openvino": ("openvino_genai",),
    "onnx": ("onnxruntime", "onnxruntime_genai", "onnx_ir"),
    "mlx": ("mlx_lm",),
    "vllm": ("vllm",),
}


@pytest.fixture(scope="module", params=PARAMS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    backend, _, own_scheduling = request.param.partition(", ")
    settings: dict[str, Any] = {"BACKEND": backend, "MAX_BATCH": 4, "N_THREADS": 1}
    if own_scheduling:
        settings["SCHEDULING"] = "engine"
    if backend != "null":
        settings["MODEL"] = tiny_llama()
        settings |= {"DTYPE": "fp32", "ARTIFACTS_DIR": str(tmp_path_factory.mktemp("artifacts"))}
    for package in PACKAGES.get(backend, ()):
        pytest.importorskip(package, reason=f"needs what BACKEND={backend} needs")
    if backend == "llama_cpp":
        settings["DTYPE"] = "f32"
    with serving(**settings) as served:
        yield served


def choice(served: Served, **fields: Any) -> dict[str, Any]:
    answer = served.post(**{"max_tokens": 24, "ignore_eos": True, **fields})
    assert answer.status_code == 200, answer.text
    only: dict[str, Any] = answer.json()["choices"][0]
    return only


def eos_token_id(served: Served) -> int:
    return int(served.get("/model").json()["eos_token_ids"][0])


def test_the_end_token_ends_an_answer_unless_it_is_ignored(served: Served) -> None:
    eos = eos_token_id(served)
    for seed in range(60):
        fields = {"prompt": "Hello", "temperature": 2.0, "seed": seed, "max_tokens": 100}
        whole = choice(served, **fields)
        if eos in whole["token_ids"][:-1]:
            break
    else:
        pytest.fail("no answer holds the end token: a useless test")
    assert (whole["finish_reason"], len(whole["token_ids"])) == ("length", 100)
    ended = choice(served, **fields, ignore_eos=False)
    assert ended["token_ids"] == whole["token_ids"][: whole["token_ids"].index(eos) + 1]
    assert ended["finish_reason"] == "stop"


def test_a_stop_string_cuts_the_text_before_it(served: Served) -> None:
    fields = {"prompt": "Hello", "temperature": 1.0, "seed": 1, "max_tokens": 40}
    text = choice(served, **fields)["text"]
    stop = next(c for c in text[len(text) // 3 :] if c.isalnum())
    stopped = choice(served, **fields, stop=stop)
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_any_script_streams_as_it_is_answered_whole(served: Served, text: str) -> None:
    fields = {"prompt": text, "temperature": 1.0, "seed": 5}
    whole = choice(served, **fields)
    frames = stream(served.url, **fields, max_tokens=24, ignore_eos=True)
    assert "".join(frame["choices"][0]["text"] for frame in frames[:-1]) == whole["text"]
    assert [i for frame in frames[:-1] for i in frame["choices"][0]["token_ids"]] == whole["token_ids"]


def test_company_changes_no_answer(served: Served) -> None:
    requests = [
        {"prompt": text * 12, "temperature": float(place % 2), "seed": place}
        for place, text in enumerate(TEXTS)
    ]
    alone = [choice(served, **fields) for fields in requests]
    together: dict[int, dict[str, Any]] = {}

    def ask(place: int) -> None:
        together[place] = choice(served, **requests[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[place]["token_ids"] for place in range(len(requests))] == [a["token_ids"] for a in alone]


def test_one_token_more_than_the_model_holds_is_refused(served: Served) -> None:
    limit = served.get("/model").json()["max_model_len"]
    answer = served.post(prompt=[1] * 10, max_tokens=limit)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_the_card_says_what_computes(served: Served) -> None:
    card = served.get("/model").json()
    settings = served.service.settings
    assert (card["backend"], card["scheduling"]) == (settings.backend, settings.scheduling)
    if card["backend"] == "llama_cpp":
        assert (card["dtype"], card["num_threads"]) == ("f32", 1)
        assert card["details"]["kv_type"] == "f32"
        assert card["model_digest"].startswith("sha256:")
        assert list(Path(served.service.settings.artifacts_dir).glob("models/*-gguf/*-f32.gguf"))


def test_the_path_for_vllm_answers_where_vllm_is_loaded(served: Served) -> None:
    answer = served.post("/generate_vllm", prompts=["a", "b"], max_tokens=3, ignore_eos=True)
    is_vllm = served.service.settings.backend == "vllm"
    assert answer.status_code == (200 if is_vllm else 501)
    assert not is_vllm or len(answer.json()["texts"]) == 2
