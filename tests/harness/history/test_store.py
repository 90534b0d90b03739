"""The folder of the history: what is added, what is read, and what damage costs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from adapters.base import LabError
from harness.history import store
from harness.history.series import marks, nights
from harness.results.manifest import GitFacts, Validity
from harness.results.record import make_table, write_parquet
from tests.harness.comparing.test_comparison import comparison, run_rows
from tests.harness.history.made_history import FIRST_NIGHT, made_night, made_nights
from tests.harness.made_rows import made_manifest
from tools.cli import main


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))


def test_adding_twice_changes_nothing(tmp_path: Path) -> None:
    paths = made_nights(tmp_path / "results", 3)
    first = store.add(tmp_path / "history", paths)
    kept = files(tmp_path / "history")
    again = store.add(tmp_path / "history", paths)
    assert (len(first.new), len(again.new), len(again.known)) == (3, 0, 3)
    assert files(tmp_path / "history") == kept
    assert kept[0].startswith("date=2026-09-01/commit=000000000000/")


def test_rows_carry_an_interval(tmp_path: Path) -> None:
    store.add(tmp_path, [made_night(tmp_path / "r", 0, 0.01, num_rows=80)])
    rows = nights(store.read(tmp_path).rows).set_index("metric")
    for metric in ("output_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "itl_p50_ms"):
        row = rows.loc[metric]
        assert row["low"] < row["value"] < row["high"], metric
        assert row["interval_source"] == "requests"
        assert (row["strategy"], row["backend"], row["load"]) == ("continuous", "null", "closed 1 x80")


def test_blocks_give_the_interval_where_there_are_three(tmp_path: Path) -> None:
    rows = [row for block, s in enumerate((1.0, 1.02, 0.98)) for row in run_rows("continuous", block, s)]
    path = tmp_path / "blocks.parquet"
    write_parquet(path, make_table(rows), made_manifest(rows, repeats=3, validity=Validity()))
    store.add(tmp_path / "h", [path])
    row = nights(store.read(tmp_path / "h").rows).set_index("metric").loc["output_tokens_per_s"]
    assert (row["interval_source"], row["num_blocks"]) == ("blocks", 3)
    assert 0.9 * row["value"] < row["low"] < row["value"] < row["high"] < 1.1 * row["value"]


def test_one_bad_block_of_five_does_not_move_the_interval(tmp_path: Path) -> None:
    speeds = (1.0, 1.01, 0.99, 1.0, 2.0)
    rows = [row for block, s in enumerate(speeds) for row in run_rows("continuous", block, s)]
    path = tmp_path / "blocks.parquet"
    write_parquet(path, make_table(rows), made_manifest(rows, repeats=5, validity=Validity()))
    store.add(tmp_path / "h", [path])
    row = nights(store.read(tmp_path / "h").rows).set_index("metric").loc["output_tokens_per_s"]
    # As far below the figure as above it, on a scale of ratios: it is the figure's own interval.
    assert row["low"] * row["high"] == pytest.approx(row["value"] ** 2)
    assert row["high"] < 1.1 * row["value"]


def test_a_commit_beside_an_older_one(tmp_path: Path) -> None:
    """As `lab gate --against-commit` leaves it: the older one is the reference, not a night of its own."""
    old = f"continuous at {'a' * 12}"
    steps = {old: (1.0, 1.01, 0.99), "continuous": (1.2, 1.21, 1.19)}
    runs = [run_rows(arm, block, s) for arm, own in steps.items() for block, s in enumerate(own)]
    rows, manifest = comparison(*runs, reference=old)
    for run in manifest.runs:
        run.git = GitFacts(sha=("a" if run.arm == old else "b") * 40)
        run.validity = Validity()
    manifest.num_blocks = 3
    path = tmp_path / "gate.parquet"
    write_parquet(path, make_table(rows), manifest)
    store.add(tmp_path / "h", [path])
    kept = store.read(tmp_path / "h").rows
    assert set(nights(kept)["commit"]) == {"b" * 12}
    ratio = kept[(kept["kind"] == "comparison") & (kept["metric"] == "output_tokens_per_s")].iloc[0]
    assert (ratio["strategy"], ratio["against"]) == ("continuous", old)
    assert ratio["low"] < ratio["value"] == pytest.approx(1 / 1.2, rel=0.02)
    assert len(files(tmp_path / "h")) == 2


def test_damaged_files_are_named_and_cost_only_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [*map(str, made_nights(tmp_path / "r", 3))]
    Path(paths[1]).write_bytes(b"PAR1 no")
    assert main(["history", "add", *paths, "--to", str(tmp_path / "h")]) == 3
    told = capsys.readouterr()
    assert "2 added, 0 there already, 1 damaged" in told.out
    assert paths[1] in told.err
    kept = sorted((tmp_path / "h").rglob("*.parquet"))
    raw = bytearray(kept[0].read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    kept[0].write_bytes(raw)
    history = store.read(tmp_path / "h")
    assert [str(kept[0]) in sentence for sentence in history.damaged] == [True]
    assert history.rows["started_at"].dt.date.nunique() == 1
    sql = "SELECT count(DISTINCT commit) AS n FROM history"
    assert main(["history", "query", "--folder", str(tmp_path / "h"), sql]) == 3
    told = capsys.readouterr()
    assert told.out.split() == ["n", "0", "1"]
    assert str(kept[0]) in told.err
    # Adding again puts the damaged one right.
    assert len(store.add(tmp_path / "h", [Path(paths[0])]).new) == 1
    assert store.read(tmp_path / "h").damaged == ()
    assert main(["history", "page", "--folder", str(tmp_path / "none")]) == 2
    assert "holds no history" in capsys.readouterr().err


def test_runs_of_a_comparison_count_once(tmp_path: Path) -> None:
    path = made_night(tmp_path / "a", 0, 0.01)
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(path.read_bytes())
    store.add(tmp_path / "h", [path, copy])
    assert len(files(tmp_path / "h")) == 1


def test_prune_keeps_the_last_days(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.add(tmp_path, made_nights(tmp_path / "r", 5))
    today = (FIRST_NIGHT + timedelta(days=4)).date()
    assert store.prune(tmp_path, keep_days=2, today=today) == 3
    assert [day.name for day in sorted(tmp_path.glob("date=*"))] == ["date=2026-09-04", "date=2026-09-05"]
    for days in ("0", "1000000", "999999999999"):
        assert main(["history", "prune", "--folder", str(tmp_path), "--keep-days", days]) == 2
        assert "--keep-days" in capsys.readouterr().err


def test_prune_leaves_what_is_no_day(tmp_path: Path) -> None:
    (tmp_path / "date=2026-13-45").mkdir()
    (tmp_path / "date=2020-01-01").write_text("a file")
    (tmp_path / "date=2020-01-02").mkdir()
    (tmp_path / "date=2020-01-02" / "commit=a").write_text("a file")
    assert store.prune(tmp_path, keep_days=1) == 0
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("sha", ["../../../../evil", "a/b/c/d", "..", "a\0b", "z" * 400, ""])
def test_a_commit_is_a_folder_only_where_it_is_the_name_of_one(tmp_path: Path, sha: str) -> None:
    path = made_night(tmp_path / "r", 0, 0.01, git={"sha": sha, "is_dirty": False})
    store.add(tmp_path / "deep" / "in" / "h", [path])
    (kept,) = files(tmp_path / "deep" / "in" / "h")
    assert kept.startswith("date=2026-09-01/commit=unknown/")
    assert set(store.read(tmp_path / "deep" / "in" / "h").rows["commit"]) == {"unknown"}


@pytest.mark.parametrize("good_first", [True, False])
def test_the_best_of_the_same_run_counts(tmp_path: Path, good_first: bool) -> None:
    """A run that was resumed is in a longer file, one that was judged again has another validity."""
    good = made_night(tmp_path / "good", 0, 0.01, num_rows=60)
    others = [
        made_night(tmp_path / "short", 0, 0.01),
        made_night(tmp_path / "bad", 0, 0.02, num_rows=90, validity=Validity(("failed requests",))),
    ]
    for path in [good, *others] if good_first else [*others, good]:
        assert len(store.add(tmp_path / "h", [path]).new) == 1
    rows = store.read(tmp_path / "h").rows
    assert set(zip(rows["validity"], rows["num_requests"], strict=True)) == {("VALID", 60)}
    assert not rows.duplicated(["metric"]).any()


def test_sql_reads_it(tmp_path: Path) -> None:
    store.add(tmp_path, made_nights(tmp_path / "r", 3))
    sql = "SELECT count(DISTINCT commit) AS n FROM history WHERE metric = 'ttft_p50_ms'"
    assert store.query(tmp_path, sql).rows["n"].tolist() == [3]
    with pytest.raises(LabError, match="Catalog Error"):
        store.query(tmp_path, "SELECT * FROM nothing")


def test_a_planted_step_is_marked_in_the_history(tmp_path: Path) -> None:
    store.add(tmp_path / "h", made_nights(tmp_path / "r", 24, step_at=14))
    found = marks(store.read(tmp_path / "h").rows)
    assert {mark.metric for mark in found} >= {"output_tokens_per_s", "tpot_p50_ms"}
    assert {abs((mark.at - FIRST_NIGHT).days - 14) <= 1 for mark in found} == {True}
