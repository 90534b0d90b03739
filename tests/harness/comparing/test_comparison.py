"""The arithmetic between arms, on runs written by hand."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters.base import ConfigError
from harness.comparing import arms
from harness.comparing.arms import arm_order, parse_arm, split_names
from harness.comparing.combine import choose_reference, merged_reasons, validity_of
from harness.comparing.comparison import (
    agreement,
    agreement_of_all,
    compare_arms,
    render_comparison,
)
from harness.comparing.trade import objective_figure
from harness.page.data import gather
from harness.page.summary import answer_sentences, arm_table, setting_lines
from harness.replay.arm_file import Arm
from harness.replay.progress import PlainReporter
from harness.results.cost import Price
from harness.results.manifest import ComparisonManifest, Validity
from harness.results.metrics import TTFT, Figure
from harness.results.record import Row, read_parquet
from harness.results.slo import Slo, parse_limits
from harness.settings import HarnessSettings
from tests.harness.made_rows import made_frame, made_manifest, made_repeat, made_row


def run_rows(
    arm: str, block: int, step_s: float, *, differs_at: int | None = None, num: int = 60
) -> list[Row]:
    """One user; every answer has two tokens and takes `step_s`."""
    return [
        made_row(
            i,
            scheduled_s=i * step_s,
            sent_s=i * step_s,
            chunk_s=(i * step_s + step_s / 2, (i + 1) * step_s),
            arm=arm,
            repeat=block,
            token_ids=[i, 999 if i == differs_at else 1],
        )
        for i in range(num)
    ]


def comparison(*runs: list[Row], reference: str = "baseline") -> tuple[list[Row], ComparisonManifest]:
    rows = [row for run in runs for row in run]
    manifests = []
    for run in runs:
        arm, block = run[0]["arm"], run[0]["repeat"]
        manifests.append(made_manifest(run, arm=arm, entries=[made_repeat(block)]))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    manifest = ComparisonManifest(
        kind="comparison",
        schema_version=1,
        started_at="2026-01-01T00:00:00+00:00",
        arms=arms,
        reference=reference,
        num_blocks=len({row["repeat"] for row in rows}),
        runs=manifests,
        validity=Validity(),
    )
    return rows, manifest


NOISY = [
    ("baseline", 0, 1.0),
    ("other", 0, 1.1),
    ("baseline", 1, 1.0),
    ("other", 1, 0.8),
    ("baseline", 2, 1.0),
    ("other", 2, 1.3),
]
BLOCKS = (
    run_rows("baseline", 0, 1.0),
    run_rows("continuous", 0, 0.25),
    # The machine is half as fast in the second block, for both.
    run_rows("continuous", 1, 0.5, differs_at=3),
    run_rows("baseline", 1, 2.0),
)


def test_figures_of_each_run() -> None:
    rows, manifest = comparison(*BLOCKS)
    figures = compare_arms(made_frame(rows), manifest)
    assert [(f.arm, f.block) for f in figures] == [
        ("baseline", 0), ("baseline", 1), ("continuous", 0), ("continuous", 1),
    ]  # fmt: skip
    assert [f.values["output_tokens_per_s"] for f in figures] == pytest.approx([2.0, 1.0, 8.0, 4.0])
    assert figures[0].values["ttft_p50_ms"] == pytest.approx(500)
    assert figures[0].values["total_p95_ms"] == pytest.approx(1000)
    assert (figures[0].mean_batch_size, figures[0].dead_row_share) == (2.0, 0.25)


def test_a_wait_before_sending_is_in_the_figures() -> None:
    late = run_rows("static", 0, 1.0)
    for row in late:
        row["sent_s"] += 0.4
        row["total_ms"] -= 400
    rows, manifest = comparison(run_rows("baseline", 0, 1.0), late)
    figures = compare_arms(made_frame(rows), manifest)
    assert [f.values["total_p95_ms"] for f in figures] == [1000, 1000]


def test_agreement_counts_equal_outputs_of_the_same_block() -> None:
    rows, manifest = comparison(*BLOCKS)
    figures = compare_arms(made_frame(rows), manifest)
    assert [(f.num_same, f.num_compared) for f in figures] == [(60, 60), (60, 60), (60, 60), (59, 60)]
    assert agreement_of_all(made_frame(rows)) == (59, 60)


def test_blocks_that_drew_other_requests_are_counted_and_told_apart() -> None:
    drawn = [[row | {"seed": row["seed"] + 1000 * row["repeat"]} for row in run] for run in BLOCKS]
    rows, manifest = comparison(*drawn)
    assert agreement_of_all(made_frame(rows)) == (119, 120)
    assert validity_of(manifest.runs, 4).invalid == ()
    text = render_comparison(made_frame(rows), manifest)
    assert "Each block drew new prompts and arrivals" in text
    assert "same output for 119 of 120 prompts" in text


def test_blocks_of_one_list_say_so() -> None:
    rows, manifest = comparison(*BLOCKS)
    assert "the intervals hold for this list alone" in render_comparison(made_frame(rows), manifest)


def test_arms_of_one_block_replay_the_same_requests() -> None:
    other = [row | {"seed": row["seed"] + 1} for row in BLOCKS[1]]
    _, manifest = comparison(BLOCKS[0], other)
    assert "different schedules" in validity_of(manifest.runs, 2).invalid[0]


def test_a_failed_or_missing_answer_does_not_agree() -> None:
    reference = run_rows("baseline", 0, 1.0, num=3)
    ours = run_rows("static", 0, 1.0, num=2)
    ours[0]["output_sha256"] = None
    assert agreement(made_frame(ours), made_frame(reference)) == (1, 3)
    assert agreement_of_all(made_frame([*reference, *ours])) == (1, 3)


def test_without_token_ids_texts_are_compared() -> None:
    ours = run_rows("static", 0, 1.0, num=3)
    for row in ours:
        row["output_sha256"] = None
    ours[1]["text_sha256"] = "other"
    reference = run_rows("baseline", 0, 1.0, num=3)
    assert agreement(made_frame(ours), made_frame(reference)) == (2, 3)


def test_tables_show_ratios_and_say_when_samples_are_too_few() -> None:
    rows, manifest = comparison(*BLOCKS)
    text = render_comparison(made_frame(rows), manifest)
    assert "4.00x [4-4]" in text
    assert "TTFT and total are from schedule." in text
    assert "continuous: better in output tok/s (4.00x)" in text
    assert "All arms gave the same output for 59 of 60 prompts." in text
    few = [run_rows("baseline", 0, 1.0, num=10), run_rows("static", 0, 1.0, num=10)]
    rows, manifest = comparison(*few)
    text = render_comparison(made_frame(rows), manifest)
    assert "n<60" in text
    needs = "a ratio of p95 needs 60, a ratio of p99 needs 300"
    assert f"Too few requests in a block (of gaps: in all blocks): {needs}" in text


def test_goodput_stands_in_every_table_where_it_decides() -> None:
    rows, manifest = comparison(*BLOCKS)
    text = render_comparison(
        made_frame(rows),
        manifest,
        objective=objective_figure("goodput", Slo(tuple(parse_limits("ttft_ms=300")))),
    )
    headers = [line for line in text.splitlines() if line.startswith("| arm ")]
    assert [line.count("goodput") for line in headers] == [1, 1], "figures and ratios"
    assert "0.00" in next(line for line in text.splitlines() if line.startswith("| baseline")), (
        "0.5 s are too late"
    )


def test_percentiles_have_their_intervals_by_ranks() -> None:
    rows, manifest = comparison(*BLOCKS)
    frame = made_frame(rows)
    lines = render_comparison(frame, manifest).splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("| intervals by ranks"))
    names, *arms = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[top], *lines[top + 2 : top + 4])
    )
    assert [arm[0] for arm in arms] == manifest.arms
    for arm in arms:
        told = dict(zip(names, arm, strict=True))
        found = Figure(TTFT, 95).interval(frame[frame["arm"] == arm[0]])
        assert found is not None
        assert told["TTFT p95 (ms)"] == f"{found[0]:,.1f}-{found[1]:,.1f}"
        assert told["ITL p99 (ms)"] == "-", "120 requests have none"


def test_the_table_and_the_page_show_one_value_of_each_figure() -> None:
    published = Path(__file__).parents[3] / "docs" / "measured" / "compare-lab-26m.parquet"
    manifest, rows = read_parquet(published)
    assert isinstance(manifest, ComparisonManifest)
    headers, lines = arm_table(gather(rows, manifest, slo=Slo(()), price=Price()))
    shown = render_comparison(rows, manifest).splitlines()
    top = next(i for i, line in enumerate(shown) if line.startswith("| arm"))
    names = [name.strip().removesuffix(" (ms)") for name in shown[top].split("|")[1:-1]]
    for line in lines:
        on_page = dict(zip(headers, line, strict=True))
        cells = next(text for text in shown[top:] if text.startswith(f"| {on_page['arm']} "))
        in_table = dict(zip(names, (cell.strip() for cell in cells.split("|")[1:-1]), strict=True))
        # The table drops tenths from 10 ms on.
        for name in [n for n in names if n in on_page and in_table[n] != on_page[n]]:
            assert abs(float(in_table[name].replace(",", "")) - float(on_page[name].replace(",", ""))) <= 0.5
        assert {"TTFT p50", "TPOT p50", "mean batch", "dead rows"} <= on_page.keys() & in_table.keys()


def test_what_padded_arms_leave_out_is_said_where_there_are_some() -> None:
    rows, manifest = comparison(*BLOCKS)
    assert "Padded arms" not in render_comparison(made_frame(rows), manifest)
    service = manifest.runs[0].service
    assert service is not None
    service.strategy["pad_finished"] = True
    assert "kinder than padded" in render_comparison(made_frame(rows), manifest)
    service.strategy["pad_style"] = "generate"
    text = render_comparison(made_frame(rows), manifest)
    assert "compute what padded generate() does" in text
    assert "kinder than padded" not in text
    service.strategy["pad_style"] = "lean"
    assert any(
        "kinder than padded" in line
        for line in setting_lines(gather(made_frame(rows), manifest, slo=Slo(()), price=Price()))
    )


ARMS = [Arm(name, name) for name in "abcdef"]


def order_of(arms: list[Arm], block: int, seed: int = 1) -> str:
    return "".join(str(arm.name) for arm in arm_order(arms, block, seed))


@pytest.mark.parametrize(("num", "num_blocks"), [(2, 2), (3, 6), (4, 4), (5, 10), (6, 6)])
def test_positions_and_neighbours_are_balanced(num: int, num_blocks: int) -> None:
    orders = [order_of(ARMS[:num], block) for block in range(num_blocks)]
    times = num_blocks // num
    for position in range(num):
        assert Counter(order[position] for order in orders) == dict.fromkeys("abcdef"[:num], times)
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert set(followed.values()) == {times}
    assert len(followed) == num * (num - 1)


def test_two_arms_are_measured_abba() -> None:
    first, second = order_of(ARMS[:2], 0), order_of(ARMS[:2], 1)
    assert first == second[::-1]
    assert order_of(ARMS[:2], 2) == first


def test_the_order_is_drawn_from_the_seed() -> None:
    assert len({order_of(ARMS, 0, seed) for seed in range(20)}) > 10


def test_arms_may_have_settings_of_their_own() -> None:
    assert split_names(["a,b", "c@X=1,Y=2"]) == ["a", "b", "c@X=1,Y=2"]
    assert parse_arm("c@max_batch=1,MODEL=lab-26m:bf16") == ("c", {"MAX_BATCH": "1", "MODEL": "lab-26m:bf16"})
    for text in ("c@MAX_BATCH", "@X=1", "c@=3"):
        with pytest.raises(ConfigError):
            parse_arm(text)
    for text, message in (
        ("c@CONCURRENCY=4", "CONCURRENCY is the same for all arms"),
        ("c@PORT=80", "PORT is the same for all arms"),
        ("c@BACKEND=nul", "there is no backend 'nul'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_arm(text)


@pytest.mark.parametrize(("style", "num_arms"), [("lean", 2), ("generate", 1)])
def test_a_style_of_padding_leaves_no_arm_without_padding(
    style: str, num_arms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(variant="static", strategy={"pad_finished": True, "pad_style": style})
    monkeypatch.setattr(arms, "_card_of", lambda *_: card)
    assert len(arms.find_arms(["static"], "both", HarnessSettings(), PlainReporter())) == num_arms


def test_the_reference_is_named_as_in_the_tables_or_as_it_was_asked_for() -> None:
    names = ["static", "continuous KV_POLICY=paged PREFIX_CACHE=1"]
    for asked in (names[1], "continuous@KV_POLICY=paged,PREFIX_CACHE=1"):
        assert choose_reference(names, asked) == names[1]
    assert choose_reference(names, None) == "static"
    with pytest.raises(ConfigError, match="not among the arms"):
        choose_reference(names, "continuous@KV_POLICY=paged")


def test_advice_names_what_makes_more_blocks() -> None:
    few = [run_rows(arm, block, step_s) for arm, block, step_s in NOISY]
    rows, manifest = comparison(*few)
    assert "(--blocks)." in render_comparison(made_frame(rows), manifest)
    for run in manifest.runs:
        run.file = f"{run.arm}.parquet"
    assert "(REPEATS of each run)." in render_comparison(made_frame(rows), manifest)


def test_reasons_that_differ_in_figures_only_are_told_once() -> None:
    reasons = [("a", ["short run: 3.1 s", "x"]), ("b", ["short run: 9.9 s"]), ("a", ["short run: 3.3 s"])]
    assert merged_reasons(reasons) == ("all arms: short run: 3.1 to 9.9 s", "a: x")


def test_arms_without_a_token_in_their_steady_window_are_shown() -> None:
    runs = [run_rows(arm, block, 1.0) for block in (0, 1) for arm in ("baseline", "static")]
    for run in runs:
        # The first answer comes whole in one chunk, with which the window begins.
        run[0] |= {"chunk_s": [run[0]["chunk_s"][0]], "chunk_tokens": [2]}
        for row in run[1:]:
            row |= {"error": "timeout"}
    rows, manifest = comparison(*runs)
    assert "steady window" in render_comparison(made_frame(rows), manifest)


def test_arms_of_two_kinds_of_scheduling_are_not_ranked() -> None:
    runs = [
        run_rows(arm, block, step_s) for block in range(3) for arm, step_s in (("lab", 1.0), ("own", 0.5))
    ]
    rows, manifest = comparison(*runs, reference="lab")
    assert "own wins" in render_comparison(made_frame(rows), manifest)
    for run in manifest.runs:
        assert run.service is not None
        run.service.scheduling = "engine" if run.arm == "own" else "lab"
    manifest.validity = validity_of(manifest.runs, 6)
    assert "kinds of scheduling" in manifest.validity.caution[0]
    text = render_comparison(made_frame(rows), manifest)
    assert "Nothing is ranked: the arms are of two kinds of scheduling (lab: lab; engine: own)." in text
    assert "wins" not in text
    data = gather(made_frame(rows), manifest, slo=Slo(()), price=Price())
    assert data.decision is None
    assert answer_sentences(data)[0].startswith("Nothing is ranked")
