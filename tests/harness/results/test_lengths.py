"""Natural lengths: told as a distribution, no doubt about a run, and compared only where they are equal."""

from __future__ import annotations

from harness.comparing.comparison import render_comparison
from harness.page.data import gather
from harness.page.files import to_markdown
from harness.results.cost import Price
from harness.results.lengths import length_table, lengths_in_words, lengths_of
from harness.results.manifest import ComparisonManifest, Validity
from harness.results.record import Row
from harness.results.slo import Slo
from harness.results.validity import judge
from tests.harness.made_rows import made_frame, made_manifest, made_row

NATURAL = {"url": None, "seed": 0, "ignore_eos": False}


def rows_of(arm: str, *, last_token: int = 9) -> list[Row]:
    """Ten answers of 1 to 10 tokens, the last two at their budget."""
    rows = [
        made_row(
            i,
            chunk_s=(1.0, 2.0) if i else (1.0,),
            chunk_tokens=(1, i) if i else (1,),
            token_ids=[1] * i + [last_token if i == 4 else 9],
            max_tokens=10,
            arm=arm,
        )
        for i in range(10)
    ]
    for row in rows:
        row["finish_reason"] = "length" if row["schedule_index"] >= 8 else "stop"
        row["run_id"] = arm
    return rows


def test_lengths_are_told_as_a_distribution() -> None:
    words = lengths_in_words(made_frame(rows_of("a")))
    assert words == (
        "p5 1, p25 3, p50 6, p75 8, p95 10, max 10, mean 5.5 tokens; 8 of 10 ended by the model, "
        "2 by their budget"
    )
    assert lengths_in_words(made_frame([made_row(error="http 500")])) == "no answers"


def test_answers_that_the_model_ends_are_no_doubt_where_it_may() -> None:
    rows = rows_of("continuous")
    early = "answers ended before their budget"
    for settings, is_doubt in (({"url": None, "seed": 0}, True), (NATURAL, False)):
        told = judge(made_frame(rows), made_manifest(rows, settings=settings)).caution
        assert any(early in sentence for sentence in told) == is_doubt


def manifest_of(*runs: list[Row], settings: dict[str, object]) -> ComparisonManifest:
    arms = [run[0]["arm"] for run in runs]
    return ComparisonManifest(
        kind="comparison",
        schema_version=1,
        started_at="2026-01-01T00:00:00+00:00",
        arms=arms,
        reference=arms[0],
        num_blocks=1,
        runs=[made_manifest(run, arm=run[0]["arm"], run_id=run[0]["arm"], settings=settings) for run in runs],
        validity=Validity(),
    )


def compared(*runs: list[Row], settings: dict[str, object]) -> str:
    rows = made_frame([row for run in runs for row in run])
    return render_comparison(rows, manifest_of(*runs, settings=settings))


def test_lengths_are_counted_between_powers_of_two() -> None:
    own = {"a": lengths_of(made_frame(rows_of("a"))), "none": lengths_of(made_frame([made_row(error="x")]))}
    assert length_table(own) == (
        ["answers of so many tokens", "1-8", "9-16", "mean", "cut"],
        [["a", "8", "2", "5.5", "2"], ["none", "0", "0", "-", "0"]],
    )
    assert own["a"].tokens.tolist() == list(range(1, 11))
    assert length_table({"none": own["none"]})[0] == ["answers of so many tokens", "1-1", "mean", "cut"]


def markdown(*runs: list[Row], settings: dict[str, object]) -> str:
    rows = made_frame([row for run in runs for row in run])
    data = gather(rows, manifest_of(*runs, settings=settings), slo=Slo(), price=Price())
    return to_markdown(data)


def test_markdown_tells_natural_lengths_and_unlike_work() -> None:
    same, other = rows_of("a"), rows_of("b", last_token=7)
    assert "answers of so many tokens" not in markdown(same, other, settings={"url": None, "seed": 0})
    text = markdown(same, rows_of("b"), settings=NATURAL)
    assert "| a, 1 user | 8 | 2 | 5.5 | 2 |" in " ".join(text.split())
    assert "caution: 1 prompts" not in text
    assert "caution: 1 prompts did not get the same" in markdown(same, other, settings=NATURAL)


def test_a_comparison_says_where_arms_did_unlike_work() -> None:
    same, other = rows_of("a"), rows_of("b", last_token=7)
    assert "Lengths are the model's own" not in compared(same, other, settings={"url": None, "seed": 0})
    text = compared(same, rows_of("b"), settings=NATURAL)
    assert "Lengths are the model's own: p5 1," in text
    assert "| a | 8 | 2 | 5.5 | 2 |" in " ".join(text.split())
    assert "caution" not in text
    assert "caution: 1 prompts did not get the same tokens in every arm" in compared(
        same, other, settings=NATURAL
    )
