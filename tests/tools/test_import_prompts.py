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
