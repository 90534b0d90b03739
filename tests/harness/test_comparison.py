"""The arithmetic between arms, on runs written by hand."""

from __future__ import annotations

import pytest

from harness.arm_file import Arm
from harness.arms import arm_order
from harness.compare import merged_reasons
from harness.comparison import (
    COLUMNS,
    agreement,
    agreement_of_all,
    compare_arms,
    ratio_to,
    render_comparison,
)
from harness.record import Manifest, Row
from harness.validity import Verdict
from tests.harness.made_rows import made_frame, made_manifest, made_repeat, made_row

TOKENS_PER_S = COLUMNS[0][1]


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


def comparison(*runs: list[Row], reference: str = "baseline") -> tuple[list[Row], Manifest]:
    rows = [row for run in runs for row in run]
    manifests = []
    for run in runs:
        arm, block = run[0]["arm"], run[0]["repeat"]
        manifests.append(made_manifest(run, arm=arm) | {"repeats": [made_repeat(block)]})
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    manifest: Manifest = {
        "kind": "comparison",
        "arms": arms,
        "reference": reference,
        "num_blocks": len({row["repeat"] for row in rows}),
        "runs": manifests,
        "validity": Verdict().as_dict(),
    }
    return rows, manifest


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
    assert [f.output_tokens_per_s for f in figures] == pytest.approx([2.0, 1.0, 8.0, 4.0])
    assert figures[0].ttft_sched_p50_ms == pytest.approx(500)
    assert figures[0].total_p95_ms == pytest.approx(1000)
    assert (figures[0].mean_batch_size, figures[0].dead_row_share) == (2.0, 0.25)


def test_ratios_are_paired_by_block() -> None:
    rows, manifest = comparison(*BLOCKS)
    figures = compare_arms(made_frame(rows), manifest)
    ratio = ratio_to("baseline", "continuous", figures, TOKENS_PER_S)
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((4.0, 4.0, 4.0))
    assert ratio_to("baseline", "absent", figures, TOKENS_PER_S) is None


def test_a_block_without_its_reference_is_left_out() -> None:
    rows, manifest = comparison(*BLOCKS[:3])
    ratio = ratio_to("baseline", "continuous", compare_arms(made_frame(rows), manifest), TOKENS_PER_S)
    assert ratio is not None
    assert ratio.num_blocks == 1


def test_agreement_counts_equal_outputs_of_the_same_block() -> None:
    rows, manifest = comparison(*BLOCKS)
    figures = compare_arms(made_frame(rows), manifest)
    assert [(f.num_same, f.num_compared) for f in figures] == [(60, 60), (60, 60), (60, 60), (59, 60)]
    assert agreement_of_all(made_frame(rows)) == (59, 60)


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
    assert "4.00x [4.00-4.00]" in text
    assert "All arms gave the same output for 59 of 60 prompts." in text
    few = [run_rows("baseline", 0, 1.0, num=10), run_rows("static", 0, 1.0, num=10)]
    rows, manifest = comparison(*few)
    assert "n<60" in render_comparison(made_frame(rows), manifest)


ARMS = [Arm(name, name) for name in "abcdef"]


def test_every_block_has_every_arm_once() -> None:
    for block in range(3):
        assert sorted(str(arm.name) for arm in arm_order(ARMS, block, 3, seed=1)) == list("abcdef")


def test_positions_are_balanced_over_as_many_blocks_as_arms() -> None:
    orders = [arm_order(ARMS, block, 6, seed=1) for block in range(6)]
    for position in range(6):
        assert len({order[position].name for order in orders}) == 6


def test_with_fewer_blocks_no_arm_keeps_its_position() -> None:
    orders = [arm_order(ARMS, block, 3, seed=1) for block in range(3)]
    for position in range(6):
        assert len({order[position].name for order in orders}) == 3


def test_the_order_is_drawn_from_the_seed() -> None:
    orders = {tuple(str(arm.name) for arm in arm_order(ARMS, 0, 3, seed)) for seed in range(20)}
    assert len(orders) > 10
    assert arm_order(ARMS, 1, 3, seed=4) == arm_order(ARMS, 1, 3, seed=4)


def test_reasons_that_differ_in_figures_only_are_told_once() -> None:
    reasons = [("a", ["short run: 3.1 s", "x"]), ("b", ["short run: 9.9 s"]), ("a", ["short run: 3.3 s"])]
    assert merged_reasons(reasons) == ("all arms: short run: 3.1 s", "a: x")
