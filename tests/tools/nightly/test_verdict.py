"""What a pair of commits says: exit status, summary, and nothing that a pull request could smuggle in."""

from __future__ import annotations

import json
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from adapters.base import ConfigError, LabError
from tools.nightly import github, history_branch, measure, trials
from tools.nightly.verdict import Line, Pair, Verdict, Word, read_verdict, to_markdown, write_verdict


def verdict(*words: Word) -> Verdict:
    line = Line(label="TPOT p50", ratio=1.2, low=1.1, high=1.3, higher_is_better=False)
    facts = {"backend": "null", "num_blocks": 3, "lines": (line,)}
    pairs = tuple(Pair(variant=f"v{i}", word=w, **facts) for i, w in enumerate(words))
    return Verdict(old="a" * 40, new="b" * 40, limit=0.05, took_s=60.0, pairs=pairs)


@pytest.mark.parametrize(
    ("words", "worst"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "can't tell"], "can't tell"),
        (["FAILED", "can't tell"], "FAILED"),
        (["REGRESSION", "FAILED"], "REGRESSION"),
        ([], "FAILED"),
    ],
)
def test_a_run_is_as_bad_as_its_worst_pair(words: list[Word], worst: Word) -> None:
    assert verdict(*words).word == worst


def test_a_pair_that_the_old_commit_lacks_is_new_and_no_failure() -> None:
    pair = Pair(backend="null", variant="gated", word="new", num_blocks=0, lines=())
    for word in ("pass", "can't tell", "REGRESSION"):
        made = verdict(word)
        assert made.model_copy(update={"pairs": (*made.pairs, pair)}).word == word
    assert made.model_copy(update={"pairs": (pair,)}).word == "pass"


def test_names_of_the_old_commit_are_asked_of_its_registries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = measure.names_added_since("HEAD")  # those of a tree that is not committed yet
    assert measure.names_added_since("no commit") == set()
    monkeypatch.setitem(measure.VARIANTS, "gated", measure.VARIANTS["static"])
    monkeypatch.setitem(measure.BACKENDS, "tpu", measure.BACKENDS["null"])
    assert measure.names_added_since("HEAD") == added | {"gated", "tpu"}
    words = ["--variants", "gated@MAX_BATCH=8", "--backends", "null", "tpu", "--against", "HEAD"]
    assert measure.main([*words, "--out", str(tmp_path), "--history", str(tmp_path)]) == 0
    made = read_verdict(tmp_path / "verdict.json")
    assert [(pair.backend, pair.word) for pair in made.pairs] == [("null", "new"), ("tpu", "new")]
    assert "| `null` | `gated@MAX_BATCH=8` | new | 0 |" in to_markdown(made)


def test_the_summary_shows_each_interval() -> None:
    text = to_markdown(verdict("REGRESSION"))
    assert text.startswith("### A regression: bbbbbbbbbbbb against aaaaaaaaaaaa")
    (bar,) = (line for line in text.splitlines() if "TPOT p50" in line)
    assert bar.index("|") < bar.index("---o")
    assert bar.endswith("1.200x [1.1-1.3]")


@pytest.mark.parametrize(
    "change",
    [
        {"new": "<img src=x>"},
        {"extra": 1},
        {"limit": "x"},
        {"took_s": 1e308},
        *(
            {
                "pairs": [
                    {"backend": "a", "variant": "v", "word": "pass", "num_blocks": 1, "lines": []} | wrong
                ]
            }
            for wrong in (
                {"backend": "[a](http://b)"},
                {"backend": "https://evil.example/login"},
                {"backend": "a\nb"},
                {"variant": "@octocat"},
                {"variant": "see www.evil.example"},
                {"variant": "v`"},
                {"word": "<b>"},
            )
        ),
    ],
)
def test_a_verdict_with_anything_else_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "verdict.json"
    write_verdict(verdict("pass"), path)
    assert read_verdict(path) == verdict("pass")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LabError, match="is no verdict"):
        read_verdict(path)


@pytest.mark.parametrize(
    ("status", "word", "exit_status"),
    [(0, "pass", 0), (1, "regression", 1), (2, "failed", 2), (3, "cant-tell", 0), (130, "failed", 2)],
)
def test_outcomes_of_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    status: int, word: str, exit_status: int,
) -> None:  # fmt: skip
    """Can't tell is not red, and not silent."""
    gate = tmp_path / "gate"
    gate.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\nexit {status}\n')
    gate.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(gate))
    monkeypatch.setattr(measure, "names_added_since", lambda old: set())
    for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    out, history = tmp_path / "out", tmp_path / "history"
    words = ["--out", str(out), "--history", str(history), "--variants", "static", "continuous"]
    made = measure.main([*words, "--backends", "null", "--budget-s", "100", "--against", "HEAD"])
    assert made == exit_status
    assert (tmp_path / "GITHUB_OUTPUT").read_text() == f"verdict={word}\n"
    assert (tmp_path / "GITHUB_STEP_SUMMARY").read_text().startswith("### ")
    assert (history / measure.LAST_GOOD).exists() == (word == "pass")
    level = {"pass": None, "cant-tell": "::warning title=Can't tell"}.get(word, "::error title=")
    assert level is None or level in capsys.readouterr().out
    calls = (tmp_path / "words").read_text().splitlines()
    # What the first leaves of its time goes to the second.
    assert "--measure-on 50 " in calls[0]
    assert "--measure-on 9" in calls[1] or "--measure-on 100 " in calls[1]


def test_the_old_commit(tmp_path: Path) -> None:
    head = measure.find_old("HEAD", tmp_path)
    (tmp_path / measure.LAST_GOOD).write_text(head + "\n")
    assert measure.find_old(None, tmp_path) == head
    (tmp_path / measure.LAST_GOOD).write_text("f" * 40)
    assert measure.find_old(None, tmp_path) != "f" * 40
    with pytest.raises(ConfigError, match="no commit"):
        measure.find_old("f" * 40, tmp_path)


def test_a_known_issue_gets_a_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def gh(*words: str) -> str:
        calls.append(words)
        return json.dumps([{"number": 5, "title": "Nightly: A regression"}]) if words[1] == "list" else ""

    monkeypatch.setattr(github, "_gh", gh)
    for word in ("REGRESSION", "can't tell", "pass"):
        write_verdict(verdict(word), tmp_path / "verdict.json")
        assert github.main(["issue", "--verdict", str(tmp_path / "verdict.json"), "--run", "1"]) == 0
    assert [call[:3] for call in calls if call[1] != "list"] == [
        ("issue", "comment", "5"),
        ("issue", "create", "--title"),
    ]


@pytest.mark.parametrize("has_artifact", [True, False])
def test_a_run_that_died_opens_an_issue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_artifact: bool
) -> None:
    calls: list[tuple[str, ...]] = []

    def gh(*words: str) -> str:
        calls.append(words)
        if words[0] == "run" and not has_artifact:
            raise LabError("gh run download: no artifact")
        return "[]"

    monkeypatch.setattr(github, "_gh", gh)
    words = ["issue", "--verdict", str(tmp_path / "verdict.json"), "--run", "1", "--download", "nightly"]
    assert github.main(words) == 2
    assert github.main([*words, "--run-failed"]) == 0
    assert calls[-1][:4] == ("issue", "create", "--title", "Nightly: A measurement failed")
    assert "without a verdict" in calls[-1][-1]
    # The history could not be kept, say.
    for word in ("pass", "can't tell"):
        write_verdict(verdict(word), tmp_path / "verdict.json")
        assert github.main([*words[:-2], "--run-failed"]) == 0
        assert calls[-1][3] == "Nightly: The run failed after the measurement"


def test_the_pull_request_is_asked_of_github(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GitHub knows no pull request of a commit that is in a fork alone."""
    write_verdict(verdict("pass"), tmp_path / "verdict.json")
    calls: list[tuple[str, ...]] = []

    def gh(*words: str) -> str:
        calls.append(words)
        pull = {"number": 9, "head": {"sha": "b" * 40}}
        return json.dumps([pull] if "head=someone:branch" in words else [])

    monkeypatch.setattr(github, "_gh", gh)
    args = ["comment", "--verdict", str(tmp_path / "verdict.json"), "--run", "1"]
    args += ["--head-branch", "someone:branch"]
    assert github.main([*args, "--head", "c" * 40]) == 0
    assert len(calls) == 1
    assert github.main([*args, "--head", "b" * 40]) == 0
    assert calls[-1][:3] == ("api", "--method", "POST")
    assert github.main([*args, "--head", "../x"]) == 2


def test_pull_and_push_keep_both_histories(tmp_path: Path) -> None:
    origin, one, two = tmp_path / "origin.git", tmp_path / "one", tmp_path / "two"
    history_branch._git("init", "--quiet", "--bare", str(origin))
    for folder in (one, two):
        folder.mkdir()
        (folder / f"{folder.name}.parquet").write_text(folder.name)
    with pytest.MonkeyPatch.context() as patch:
        work = tmp_path / "work"
        history_branch._git("init", "--quiet", str(work))
        patch.chdir(work)
        history_branch._git("remote", "add", "origin", str(origin))
        assert history_branch.main(["pull", "--folder", str(tmp_path / "new")]) == 0
        # Another branch whose name has the same end.
        history_branch._git(*history_branch._WHO, "commit", "--quiet", "--allow-empty", "-m", "x")
        history_branch._git("push", "--quiet", "origin", "HEAD:refs/heads/feature/bench-history")
        for folder in (one, two, two):
            assert history_branch.main(["push", "--folder", str(folder)]) == 0
        assert history_branch.main(["pull", "--folder", str(tmp_path / "all")]) == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["one.parquet", "two.parquet"]


def test_pruning_reaches_the_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    origin, mine, theirs = tmp_path / "origin.git", tmp_path / "mine", tmp_path / "theirs"
    history_branch._git("init", "--quiet", "--bare", str(origin))
    history_branch._git("init", "--quiet", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path / "work")
    history_branch._git("remote", "add", "origin", str(origin))
    for day in ("2020-01-01", f"{datetime.now(UTC):%Y-%m-%d}"):
        part = mine / f"date={day}" / "commit=aaaaaaa"
        part.mkdir(parents=True)
        (part / "x.parquet").write_text(day)
    (mine / measure.LAST_GOOD).write_text("a" * 40)
    push = ["push", "--folder", str(mine)]
    assert history_branch.main(push) == 0
    # As one accepts a slowdown on purpose.
    (mine / measure.LAST_GOOD).write_text("b" * 40)
    assert history_branch.main([*push, "--keep-days", "400"]) == 0
    assert history_branch.main(["pull", "--folder", str(theirs)]) == 0
    assert [path.read_text() for path in theirs.rglob("*.parquet")] == [f"{datetime.now(UTC):%Y-%m-%d}"]
    assert (theirs / measure.LAST_GOOD).read_text() == "b" * 40
    assert history_branch.main([*push, "--keep-days", "0"]) == 2
    assert "--keep-days must be" in capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "word"), [(1.0, "pass"), (1 / 1.2, "REGRESSION")])
def test_made_up_nights_end_as_the_gate_would_end_them(ratio: float, word: str) -> None:
    noise = np.random.default_rng(0).normal(size=(20, 30))
    ended = [trials.night(np.log(ratio) + 0.02 * one, 0.05) for one in noise]
    assert {end for end, _ in ended} == {word}
    assert trials.night(np.log(ratio) + 0.02 * noise[0, :3], 0.001)[1] == 3


def test_a_measurement_that_is_told_to_stop_cleans_up_first(tmp_path: Path) -> None:
    """The gate ends its services and removes its worktree, which a killed one would leave behind."""
    # Under `nohup ... &` it is ignored, and a shell cannot trap what it inherits as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    left = tmp_path / "left"
    gate = f"touch {left}; trap 'rm {left}; exit 130' INT; kill -INT $PPID; while :; do sleep 0.05; done"
    with pytest.raises(KeyboardInterrupt):
        measure._run_to_its_end(["sh", "-c", gate])
    assert not left.exists()
