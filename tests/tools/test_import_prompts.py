"""Prompts from elsewhere become a corpus that the harness accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.plan.corpus import load_corpus
from tools.cli import main

SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "x" * 40}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "nobody asked"}]},
    {"id": "c", "conversations": [{"from": "human", "value": "Line\u2028separator"}]},
]
MESSAGES = [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    {
        "body": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}],
            "max_tokens": 7,
        }
    },
]
PLAIN = [{"prompt": "one", "max_tokens": 3}, {"text": "two"}]


def write(path: Path, items: list[dict[str, Any]], *, as_list: bool) -> Path:
    text = json.dumps(items) if as_list else "\n".join(json.dumps(i, ensure_ascii=False) for i in items)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("items", "as_list", "budget", "expected"),
    [
        (SHAREGPT, True, "reply", [("Hello?", 10), ("Line\u2028separator", 1)]),
        (MESSAGES, False, "64", [("Be brief.\n\nWhy?", 64), ("parts", 7)]),
        (PLAIN, False, "5", [("one", 3), ("two", 5)]),
    ],
)
def test_formats(
    tmp_path: Path, items: list[dict[str, Any]], as_list: bool, budget: str, expected: list[tuple[str, int]]
) -> None:
    source, out = write(tmp_path / "source.json", items, as_list=as_list), tmp_path / "corpus.jsonl"
    assert main(["import-prompts", str(source), "--out", str(out), "--max-tokens", budget]) == 0
    corpus = load_corpus(out)
    assert [(p.prompt, p.max_tokens) for p in corpus.prompts] == expected
    assert corpus.is_as_recorded


@pytest.mark.parametrize("content", ["[1, 2]", '{"other": 1}', "not json", '[{"conversations": []}]'])
def test_files_without_prompts_are_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.json"
    source.write_text(content, encoding="utf-8")
    assert main(["import-prompts", str(source), "--out", str(tmp_path / "c.jsonl")]) == 2
    assert str(source) in capsys.readouterr().err


def test_token_ids_and_lists_of_prompts_are_taken(tmp_path: Path) -> None:
    items = [{"prompt": [5, 6]}, {"prompt": ["a", [7]], "max_tokens": 2}, {"prompt": "plain"}]
    source, out = write(tmp_path / "source.jsonl", items, as_list=False), tmp_path / "corpus.jsonl"
    assert main(["import-prompts", str(source), "--out", str(out), "--max-tokens", "9"]) == 0
    found = [(p.prompt, p.max_tokens) for p in load_corpus(out).prompts]
    assert found == [((5, 6), 9), ("a", 2), ((7,), 2), ("plain", 9)]


def test_entries_without_a_prompt_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt = {"conversations": [{"from": "gpt", "value": "x"}]}
    items = [{"prompt": "one"}, {"prompt": []}, gpt, {"text": " "}]
    source, out = write(tmp_path / "source.json", items, as_list=True), tmp_path / "corpus.jsonl"
    assert main(["import-prompts", str(source), "--out", str(out)]) == 0
    assert f"3 entries of {source} hold no prompt: 2, 3, 4" in capsys.readouterr().err


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("item", "kept", "said"),
    [
        ({"prompt": ["a", ""]}, ["a"], "2 in part"),
        ({"prompt": [1, "a"]}, ["a"], "2 in part"),
        ({"prompt": [None, "a"]}, ["a"], "2 in part"),
        ({"prompt": [True, "a"]}, ["a"], "2 in part"),
        ({"prompt": [[1, 2], [-1]]}, [(1, 2)], "2 in part"),
        ({"prompt": [["a"], {"text": "b"}]}, ["a"], "2 in part"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]}, [], "2"),
        ({"messages": [{"role": "user", "content": None}, {"role": "user", "content": "b"}]}, [], "2"),
        ({"prompt": "a", "max_tokens": 10**20}, [], "2"),
    ],
)
def test_no_part_of_an_entry_is_left_out_in_silence(
    tmp_path: Path,
    item: dict[str, Any],
    kept: list[str | tuple[int, ...]],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    items = [{"prompt": "one"}, item]
    source, out = write(tmp_path / "source.json", items, as_list=True), tmp_path / "corpus.jsonl"
    assert main(["import-prompts", str(source), "--out", str(out)]) == 0
    assert f"1 entries of {source} hold no prompt: {said}\n" in capsys.readouterr().err
    assert [p.prompt for p in load_corpus(out).prompts] == ["one", *kept]


def test_a_number_of_prompts_below_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "source.json", PLAIN, as_list=True)
    with pytest.raises(SystemExit):
        main(["import-prompts", str(source), "--out", str(tmp_path / "c.jsonl"), "--n", "-1"])
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '[{"prompt": "a\\ud83d"}, {"prompt": "fine"}]',
            "entry 1: its text holds half a character (\\ud83d)",
        ),
        ("[" * 100_000, "neither a JSON list nor JSON lines"),
        ('{"body": 3}', "entry 1: has no conversations"),
    ],
)
def test_what_cannot_be_sent_is_one_sentence(
    tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.json"
    source.write_text(content, encoding="utf-8")
    assert main(["import-prompts", str(source), "--out", str(tmp_path / "c.jsonl")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    source, out = tmp_path / "source.jsonl", tmp_path / "corpus.jsonl"
    source.write_bytes('{"prompt": "one"}\r\n{"prompt": "two"}\r\n'.encode(encoding))
    assert main(["import-prompts", str(source), "--out", str(out)]) == 0
    assert [p.prompt for p in load_corpus(out).prompts] == ["one", "two"]
