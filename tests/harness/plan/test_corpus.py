"""A corpus is what its digest file says, or it is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from adapters.base import ConfigError
from harness.plan.corpus import default_path, load_corpus
from harness.plan.planner import plan
from harness.plan.schedule import Arrivals, Load, make_schedule
from harness.settings import HarnessSettings

LINE = '{"id": "a", "prompt": "Hello", "max_tokens": 3, "category": "x"}\n'


TURNS = (
    '{"id": "b", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, '
    '{"role": "user", "content": "Bye"}], "max_tokens": 3, "category": "chat"}\n'
)


def write(folder: Path, text: str, *, recorded: str | None = None) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    if recorded is not None:
        digest = hashlib.sha256(recorded.encode()).hexdigest()
        (folder / "prompts.sha256").write_text(f"{digest}  prompts.jsonl\n")
    return path


def test_recorded_corpus_is_read(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path, LINE, recorded=LINE))
    assert [(p.id, p.prompt, p.max_tokens, p.category) for p in corpus.prompts] == [("a", "Hello", 3, "x")]
    assert corpus.is_as_recorded


def test_changed_corpus_is_refused_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, LINE + LINE.replace('"a"', '"b"'), recorded=LINE)
    with pytest.raises(ConfigError, match="is not the recorded corpus"):
        load_corpus(path)
    assert not load_corpus(path, allow_changed=True).is_as_recorded


def test_corpus_without_digest_is_refused_with_the_command_to_record_it(tmp_path: Path) -> None:
    path = write(tmp_path, LINE)
    with pytest.raises(ConfigError, match="sha256sum"):
        load_corpus(path)
    assert load_corpus(path, allow_changed=True).recorded_sha256 is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", "line 1"),
        (LINE + '{"id": "b", "prompt": "", "max_tokens": 3}\n', "line 2: prompt"),
        ('{"id": "a", "prompt": "x", "max_tokens": 0}\n', "max_tokens"),
        (f'{{"id": "a", "prompt": "x", "max_tokens": {10**20}}}\n', "line 1: max_tokens"),
        (LINE + LINE, "line 2: the id 'a' is used twice"),
        ("\n", "holds no prompts"),
        (LINE + '{"id": "b", "prompt": "x", "max_tokens": 3, "chat": true}\n', "line 2: `chat` must be"),
        ('{"id": "a", "prompt": [1], "max_tokens": 3, "chat": true}\n', "chat needs a text"),
        ('{"id": "a", "max_tokens": 3}\n', "needs either a prompt or messages"),
        ('{"id": "a", "messages": [], "max_tokens": 3}\n', "line 1: messages"),
        ('{"id": "a", "messages": [{"role": "user"}], "max_tokens": 3}\n', "messages.0.content"),
        (LINE.replace('"max', '"messages": [{"role": "user", "content": "x"}], "max'), "needs either"),
        (LINE + TURNS, "line 2: `chat` must be"),
    ],
)
def test_malformed_corpus_names_the_line_and_the_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_corpus(write(tmp_path, text, recorded=text))


def test_missing_corpus_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lab prompts"):
        load_corpus(tmp_path / "none.jsonl")


def test_line_separators_inside_prompts_do_not_split_lines(tmp_path: Path) -> None:
    text = LINE.replace("Hello", "Hel\u2028lo")
    assert load_corpus(write(tmp_path, text, recorded=text)).prompts[0].prompt == "Hel\u2028lo"


def test_the_corpus_of_the_project_is_the_recorded_one() -> None:
    assert len(load_corpus(default_path()).prompts) >= 64


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_corpus_and_its_digest_are_read_in_any_unicode_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"id": "p0", "prompt": "Hello\u2028there", "max_tokens": 8}\r\n'.encode(encoding))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".sha256").write_bytes(f"{digest}  prompts.jsonl\r\n".encode(encoding))
    corpus = load_corpus(path)
    assert corpus.is_as_recorded
    assert corpus.prompts[0].prompt == "Hello\u2028there"


def test_the_instructions_are_messages_of_a_chat() -> None:
    corpus, schedule = plan(HarnessSettings(corpus="instructions"), allow_changed_corpus=False)
    assert corpus.path.name == "instructions.jsonl"
    assert all(prompt.is_chat for prompt in corpus.prompts)
    assert all(request.is_chat for request in schedule.requests)
    turns = {len(request.chat) for request in schedule.requests}
    assert {1, 3} <= turns <= {1, 3, 5}
    assert all(request.chat[-1]["role"] == "user" for request in schedule.requests)


def test_clients_and_classes_of_a_corpus_are_planned(tmp_path: Path) -> None:
    text = LINE + LINE.replace('"a"', '"b", "user": "ann", "priority": 2')
    corpus = load_corpus(write(tmp_path, text, recorded=text))
    schedule = make_schedule(corpus.prompts, 2, Load(Arrivals.CLOSED, concurrency=2), 1)
    assert [(r.user, r.priority) for r in schedule.requests] == [(None, None), ("ann", 2)]
    wrong = LINE.replace('"a"', '"b", "priority": 3')
    with pytest.raises(ConfigError, match="line 1: priority"):
        load_corpus(write(tmp_path, wrong, recorded=wrong))


def test_a_chat_keeps_its_turns_in_every_part_of_a_schedule(tmp_path: Path) -> None:
    text = TURNS + LINE.replace('"cat', '"chat": true, "cat')
    corpus = load_corpus(write(tmp_path, text, recorded=text))
    schedule = make_schedule(corpus.prompts, 4, Load(Arrivals.CLOSED, concurrency=2), 1)
    assert [len(request.chat) for request in schedule.part(0, 2).requests] == [3, 3]
    assert [len(request.chat) for request in schedule.part(1, 2).requests] == [1, 1]
