"""Files of a wrong kind among those that a command is given: passed over with a line, or refused in one."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.comparing.combine import read_result
from harness.page.data import load_report
from harness.page.files import write_charts
from harness.results.cost import Price
from harness.results.manifest import Validity
from harness.results.record import JOURNAL_SUFFIX, Journal, make_table, read_parquet, write_parquet
from harness.results.slo import Slo
from harness.results.steps import step_rows, write_steps
from harness.results.validity import judge
from services.contract.status import StepLine
from tests.harness.commands.test_gate import write_file
from tests.harness.comparing.test_comparison import comparison, run_rows
from tests.harness.made_rows import made_frame, made_manifest, made_row
from tools.cli import main

LINE = StepLine(
    step=0, start_s=0.0, duration_s=9.0, num_rows=1, num_prompt_tokens=1, num_decode_tokens=0,
    num_dead_rows=0, queue_depth=0,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_file(tmp_path / "run.parquet", 1.0, 1.01, 0.99, 1.0)


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    path = tmp_path / "run.steps.parquet"
    write_steps(path, step_rows([LINE], "run", 0), made_manifest([made_row()]))
    return path


def test_a_glob_finds_step_logs_which_are_passed_over(
    run: Path, steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = write_file(run.with_name("second.parquet"), 1.0, 1.0, 1.0, 1.0, sha="b" * 40)
    found = sorted(run.parent.glob("*.parquet"))
    assert steps in found
    for words in (["report"], ["compare", "--files"]):
        assert main([*words, *map(str, found)]) == 0
        told = capsys.readouterr()
        assert f"passed over: {steps}, which holds steps, not requests" in told.err
        assert "output" in told.out
    assert second.exists()


def test_a_step_log_alone_is_told(run: Path, steps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = steps.with_name("renamed.parquet")
    renamed.write_bytes(steps.read_bytes())
    for path in (steps, renamed):
        for words in (
            ["report", str(path)],
            ["compare", "--files", str(path)],
            ["gate", str(run), "--against", str(path)],
            ["gate", str(path), "--against", str(run)],
            ["merge", str(path), "--out", str(run.with_name("out.parquet"))],
        ):
            assert main(words) == 2
            said = capsys.readouterr().err
            assert f"{path} holds the steps of a run, not its requests: name the file without .steps" in said


@pytest.mark.parametrize(
    "kind", ["text", "folder", "nothing", "journal", "page", "pipe", "circle", "foreign", "named"]
)
def test_other_files_are_told(run: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.with_name(f"other{JOURNAL_SUFFIX}" if kind == "journal" else "other.parquet")
    if kind == "folder":
        path.mkdir()
    elif kind == "journal":
        Journal(path, made_manifest([made_row()])).close()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path)
    elif kind in ("foreign", "named"):
        name = "a\x1b[31m\n|<b>" + "x" * 1_000_000 if kind == "named" else "a"
        pq.write_table(pa.table({name: [1]}), path)
    elif kind != "nothing":
        path.write_bytes(b"run_id,arm\n" if kind == "text" else b"<!doctype html>")
    for words in (
        ["compare", "--files", str(run), str(path)],
        ["gate", str(path), "--against", str(run)],
        ["merge", str(run), str(path), "--out", str(run.with_name("out.parquet"))],
    ):
        assert main(words) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert str(path) in said
        assert len(said) < 1000


def test_a_run_without_an_end_is_no_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, make_table([made_row()]), made_manifest([made_row()], entries=[]))
    assert main(["merge", str(path), "--out", str(tmp_path / "out.parquet")]) == 2
    assert "did not reach its end: measure this shard anew" in capsys.readouterr().err


def test_charts_of_arms_whose_names_hold_slashes(tmp_path: Path) -> None:
    names = ["a MODEL=/models/x", "a MODEL=-models-x", "a MODEL=../" + "y" * 300]
    runs = [run_rows(name, block, 1.0) for block in range(3) for name in names]
    rows, manifest = comparison(*runs, reference=names[0])
    for number, made in enumerate(manifest.runs):
        made.run_id, made.validity = f"run-{number}", Validity()
        made.path = str(tmp_path / f"{number}.parquet")
        write_steps(tmp_path / f"{number}.steps.parquet", step_rows([LINE], made.run_id, 0), made)
        for row in runs[number]:
            row |= {"run_id": made.run_id, "received_s": row["sent_s"], "queue_s": 0.0}
            row |= {"batch_wait_s": 0.0, "prefill_s": 0.1, "decode_s": 0.1}
    path = tmp_path / "all.parquet"
    write_parquet(path, make_table(rows), manifest)
    data = load_report([read_result(path)], slo=Slo(), price=Price(), reference=None, margin=0.05)
    written = write_charts(data, tmp_path / "png", "png")
    assert len(set(written)) == len(written)
    assert {"slots.png", "throughput-latency.png"} <= {chart.name for chart in written}
    assert all(chart.parent == tmp_path / "png" and chart.is_file() for chart in written)


def test_charts_and_slide_of_names_that_no_picture_can_hold(tmp_path: Path) -> None:
    name = "a\x00\x1b b"
    rows = [made_row(i, arm=name, chunk_s=(1.0 + i, 2.0 + i)) for i in range(20)]
    path, slide = tmp_path / "run.parquet", tmp_path / "slide.png"
    write_parquet(path, make_table(rows), made_manifest(rows, arm=name, model="m\x00", validity=Validity()))
    assert (
        main(["report", str(path), "--markdown", "--svg", str(tmp_path / "svg"), "--slide", str(slide)]) == 0
    )
    assert slide.is_file()
    assert all("\x1b" not in chart.read_text("utf-8") for chart in (tmp_path / "svg").iterdir())


def test_damage_in_a_row_group_is_told_and_the_others_are_recovered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [made_row(i, sent_s=i, chunk_s=(i + 0.5, i + 1.0)) for i in range(300)]
    path = tmp_path / "run.parquet"
    write_parquet(path, make_table(rows), made_manifest(rows, validity=Validity()))
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # in the first of three groups of 128, 128 and 44 rows
    path.write_bytes(content)
    assert main(["report", str(path)]) == 2
    assert f"{path} cannot be read as parquet: " in capsys.readouterr().err
    assert main(["report", "--recover", str(path)]) == 1
    manifest, kept = read_parquet(tmp_path / "run.recovered.parquet")
    assert sorted(kept["schedule_index"]) == list(range(128, 300))
    assert manifest.damage == f"128 of 300 rows of {path} are damaged and left out"
    told = capsys.readouterr().out
    assert "INVALID: 128 of 300 requests were never finished" in told
    assert f"caution: {manifest.damage}" in told


def test_rows_of_a_journal_outlast_its_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [made_row(i) for i in range(5)]
    path = tmp_path / f"run{JOURNAL_SUFFIX}"
    journal = Journal(path, made_manifest(rows))
    for row in rows:
        journal.append(row)
    journal.close()
    path.write_bytes(path.read_bytes().replace(b'"schema_version":1', b'"schema_version":2', 1))
    assert main(["report", str(path)]) == 2
    assert "has a damaged manifest; --recover saves its 5 whole rows" in capsys.readouterr().err
    assert main(["report", "--recover", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"its 5 whole rows are now in {tmp_path / 'run.parquet'}, for pandas.read_parquet" in told
    assert (tmp_path / "run.parquet").is_file()


def test_a_comparison_that_stopped_before_its_reference_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, manifest = comparison(run_rows("static", 0, 1.0), reference="baseline")
    manifest.runs[0].validity = Validity()
    path = tmp_path / "x.parquet"
    write_parquet(path, make_table(rows), manifest)
    assert main(["report", str(path)]) == 0
    assert "report: " in capsys.readouterr().out


def test_names_from_outside_are_escaped_in_headings_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a](x) <img src=y> \x1b[31m`"
    rows = run_rows("baseline", 0, 1.0)
    path = tmp_path / "x.parquet"
    write_parquet(path, make_table(rows), made_manifest(rows, arm="baseline", model=name))
    main(["report", str(path), "--markdown"])
    shown = capsys.readouterr().out
    assert r"### baseline on a\](x) \<img src=y\> \\x1b\[31m\`" in shown
    assert "<img" not in shown.replace(r"\<img", "")
    main(["report", str(path), "--html", str(tmp_path / "x.html")])
    assert "\x1b" not in capsys.readouterr().out
    assert "<img src=y" not in (tmp_path / "x.html").read_text()


def test_reasons_from_outside_are_escaped_wherever_they_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = "http 500: <img src=y> [a](x)\x1b[31m\nVALID"
    paths = []
    for name in ("baseline", "b\x1b[31m\nVALID"):
        rows = [*run_rows(name, 0, 1.0), made_row(99, error=error, arm=name)]
        manifest = made_manifest(rows, arm=name, damage=error)
        manifest.validity = judge(made_frame(rows), manifest)
        paths.append(tmp_path / f"{len(paths)}.parquet")
        write_parquet(paths[-1], make_table(rows), manifest)
    files = [str(path) for path in paths]
    for command in (
        ["report", files[0]],
        ["report", *files, "--markdown"],
        ["compare", "--files", *files],
        ["compare", "--files", *files, "--allow-invalid"],
        ["gate", files[1], "--against", files[0], "--allow-invalid"],
    ):
        main(command)
        shown = capsys.readouterr()
        told = shown.out + shown.err
        assert r"http 500: " in told
        assert "\x1b" not in told
        assert "\nVALID" not in told.replace("\nVALID\n", "")
        if "--markdown" in command:
            assert "<img" not in told.replace(r"\<img", "")
