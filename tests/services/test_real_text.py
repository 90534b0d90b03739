"""Real text through the whole service: answers that end by themselves, the same under every strategy.

Weights with a real vocabulary show what seeded ones cannot: ends, templates, characters of several tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import pytest

from adapters.base import Backend, BackendConfig
from adapters.data_files import DATA
from adapters.registry import create_backend, load_tokenizer
from services.strategies import VARIANTS
from tests.adapters.chat import chat_token_ids
from tests.adapters.smollm2 import NAME, artifacts, messages, needs_smollm2
from tests.services.served import Served, events, serving
from tools.engine_drive import Work, drive

torch = pytest.importorskip("torch", reason="needs the torch extra")

pytestmark = [*needs_smollm2, pytest.mark.timeout(1200)]

NUM_PROMPTS = 64
CAP = int(os.environ.get("REAL_TEXT_CAP", "12"))
"""Tokens of the longest answers; the model ends others before. 256, the corpus's own cap, takes minutes."""
PATIENCE_S = 300.0
QUESTION = "Name the months that have 30 days."


def config(backend: str, file_format: str) -> BackendConfig:
    return BackendConfig(
        backend=backend,
        model=f"{NAME}:{file_format}",
        artifacts_dir=artifacts(),
        num_threads=1,
        max_batch_size=16,
        max_model_len=512,
    )


@cache
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(config("torch", "fp32"))
    lines = (DATA / "instructions.jsonl").read_text("utf-8").splitlines()[:64]
    chats = [line.get("messages") or messages(line["prompt"]) for line in map(json.loads, lines)]
    return [chat_token_ids(tokenizer, chat) for chat in chats]


@cache
def torch_backend(file_format: str) -> Backend:
    return create_backend(config("torch", file_format))


def answers(backend: Backend, variant: str, num_prompts: int) -> list[list[int]]:
    made: dict[int, list[int]] = {}
    drive(
        backend,
        variant,
        [Work(prompt, CAP, ignore_eos=False) for prompt in prompts()[:num_prompts]],
        publish=lambda report: (
            [made.setdefault(u.seq_id, []).extend(u.token_ids) for u in report.updates] and None
        ),
    )
    return [made[i] for i in range(num_prompts)]


@cache
def continuous(file_format: str) -> list[list[int]]:
    return answers(torch_backend(file_format), "continuous", NUM_PROMPTS)


def test_answers_end_by_themselves() -> None:
    backend = torch_backend("fp32")
    ends = [answer for answer in continuous("fp32") if len(answer) < CAP]
    assert 1 < len(ends) < NUM_PROMPTS
    assert all(answer[-1] in backend.info.eos_token_ids for answer in ends)


@pytest.mark.parametrize("file_format", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"continuous"}))
def test_every_strategy_gives_the_same_tokens(variant: str, file_format: str) -> None:
    backend = torch_backend(file_format)
    assert answers(backend, variant, NUM_PROMPTS) == continuous(file_format)


def test_greedy_answers_are_those_of_transformers() -> None:
    """Every token is the best of transformers' own scores, given the tokens before it, as in `generate()`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(f"{artifacts()}/models/{NAME}", dtype=torch.float32)
    for prompt, answer in zip(prompts(), continuous("fp32"), strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            scores = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
        assert scores.argmax(-1).tolist() == answer


@pytest.mark.llama
def test_llama_cpp_gives_nearly_the_same_answers() -> None:
    """In f32; its sums are rounded in another order."""
    pytest.importorskip("llama_cpp", reason="needs the llama extra")
    theirs = answers(create_backend(config("llama_cpp", "f32")), "continuous", NUM_PROMPTS)
    same = sum(ours == other for ours, other in zip(continuous("fp32"), theirs, strict=True))
    assert same >= 0.95 * NUM_PROMPTS


def test_characters_of_several_tokens_are_never_shown_in_part() -> None:
    tokenizer = load_tokenizer(config("torch", "fp32"))
    emoji, words = (
        "\U0001f389 \U0001f469\u200d\U0001f52c",
        "\u3053\u3093\u306b\u3061\u306f \u4f60\u597d \uc548\ub155",
    )
    text = f"{emoji} {words} na\u00efve"
    token_ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([token_id]) for token_id in token_ids)
    stream = tokenizer.stream()
    pieces = [*(stream.push([token_id]) for token_id in token_ids), stream.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


# Over HTTP


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    settings = {"BACKEND": "torch", "MODEL": f"{NAME}:fp32", "ARTIFACTS_DIR": artifacts(), "N_THREADS": 1}
    with serving(**settings, MAX_MODEL_LEN=512, MAX_BATCH=4, deadline_s=PATIENCE_S) as served:
        yield served


def post(served: Served, path: str = "/generate", **fields: Any) -> httpx.Response:
    """A busy machine may need minutes for real weights."""
    answer = httpx.post(served.url + path, json={"max_tokens": 8, **fields}, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer


def choices_of(stream: str) -> list[dict[str, Any]]:
    return [choice for frame in events(stream) if frame != "[DONE]" for choice in frame["choices"]]


def first_choice(served: Served, **fields: Any) -> dict[str, Any]:
    choice: dict[str, Any] = post(served, **fields).json()["choices"][0]
    return choice


def test_a_chat_is_answered_in_words_and_ends(served: Served) -> None:
    asked = {"messages": messages("What is 2 plus 2?"), "max_tokens": 60}
    (choice,) = post(served, "/v1/chat/completions", **asked).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert "4" in choice["message"]["content"]
    assert "<|" not in choice["message"]["content"]
    assert choice["token_ids"][-1] == 2


def test_a_prompt_sent_as_chat_is_the_chat(served: Served) -> None:
    chat = post(served, "/v1/chat/completions", messages=messages(QUESTION)).json()
    plain = first_choice(served, prompt=[QUESTION, "Hi"], chat=True)
    assert plain["token_ids"] == chat["choices"][0]["token_ids"]
    assert served.get("/model").json()["eos_token_ids"] == [0, 2, 4]


def test_a_stop_string_may_cross_tokens_and_frames(served: Served) -> None:
    fields = {"prompt": QUESTION, "chat": True, "max_tokens": 16}
    text = first_choice(served, **fields)["text"]
    stop = text[len(text) // 2 - 4 : len(text) // 2 + 5]
    assert " " in stop
    stopped = choices_of(post(served, **fields, stop=[stop], stream=True).text)
    streamed = "".join(choice["text"] for choice in stopped)
    assert streamed == text[: text.index(stop)]
    pieces = [choice["text"] for choice in choices_of(post(served, **fields, stream=True).text)]
    assert len([piece for piece in pieces if piece]) > 4
    assert not any(stop in piece for piece in pieces)


def test_none_of_several_ends_comes_before_min_tokens(served: Served) -> None:
    fields = {"prompt": "What is 2 plus 2? Answer in one word.", "chat": True, "max_tokens": 24}
    plain = first_choice(served, **fields)
    assert plain["finish_reason"] == "stop"
    num = len(plain["token_ids"]) + 4
    longer = first_choice(served, **fields, min_tokens=num)["token_ids"]
    assert len(longer) >= num
    assert not {0, 2, 4} & set(longer[: num - 1])
    ignoring = first_choice(served, **fields, ignore_eos=True)
    assert (len(ignoring["token_ids"]), ignoring["finish_reason"]) == (24, "length")
    assert ignoring["token_ids"][: len(plain["token_ids"])] == plain["token_ids"]


def test_logprobs_are_those_of_generate(served: Served) -> None:
    """`generate()` tells the scores of each step; in fp32 both sum in other orders."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(f"{artifacts()}/models/{NAME}", dtype=torch.float32)
    choice = first_choice(served, prompt=[prompts()[0]], logprobs=5)
    made = model.generate(
        torch.tensor([prompts()[0]]),
        max_new_tokens=8,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert choice["token_ids"] == made.sequences[0, len(prompts()[0]) :].tolist()
    told = choice["logprobs"]
    for at, scores in enumerate(made.scores):
        theirs = scores[0].log_softmax(-1)
        assert told["token_logprobs"][at] == pytest.approx(float(theirs[choice["token_ids"][at]]), abs=1e-3)
        assert sorted(told["top_logprobs"][at].values()) == pytest.approx(
            sorted(theirs.topk(5).values.tolist()), abs=1e-3
        )


def test_sampling_is_seeded_and_penalties_count(served: Served) -> None:
    fields = {"prompt": QUESTION, "chat": True}
    sampled = {**fields, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    alone = first_choice(served, **sampled)["token_ids"]
    assert alone == first_choice(served, **sampled)["token_ids"]
    assert alone != first_choice(served, **{**sampled, "seed": 4})["token_ids"]
    company = {**sampled, "prompt": [QUESTION, "Hello!", "Write a poem."], "seed": [3, 1, 2]}
    assert first_choice(served, **company)["token_ids"] == alone
    plain = first_choice(served, **fields, max_tokens=16)["token_ids"]
    assert first_choice(served, **fields, max_tokens=16, repetition_penalty=2.0)["token_ids"] != plain
