"""The columns others rely on, and rows that survive whatever ends the harness."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from adapters.base import LabError
from harness.results.record import (
    JOURNAL_SUFFIX,
    SCHEMA,
    Journal,
    make_table,
    read_journal,
    read_parquet,
    write_parquet,
)
from harness.results.recovery import recover
from tests.harness.made_rows import made_manifest, made_repeat, made_row

GOLDEN = {
    "run_id": "string", "variant": "string", "arm": "string", "backend": "string", "model": "string",
    "repeat": "int32", "request_id": "string", "prompt_id": "string", "schedule_index": "int32",
    "offset_s": "double", "max_tokens": "int32", "seed": "int64", "user": "string", "priority": "int32",
    "group_id": "int32", "group_size": "int32",
    "body_sha256": "string", "scheduled_s": "double", "sent_s": "double", "chunk_s": "list<element: double>",
    "chunk_tokens": "list<element: int32>", "finish_s": "double", "ttft_ms": "double",
    "ttft_sched_ms": "double", "tokens_per_sec": "double", "tpot_ms": "double", "total_ms": "double",
    "total_sched_ms": "double", "num_prompt_tokens": "int32", "num_output_tokens": "int32",
    "finish_reason": "string", "error": "string", "output_sha256": "string", "text_sha256": "string",
    "output_token_ids": "list<element: int32>", "server_request_id": "string", "queue_s": "double",
    "batch_wait_s": "double",
    "num_cached_tokens": "int32", "prefill_s": "double", "decode_s": "double", "num_steps": "int32",
    "mean_batch_size": "double", "written_s": "double", "received_s": "double", "first_token_s": "double",
    "first_write_s": "double",
}  # fmt: skip


def test_golden_schema(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, make_table([made_row()]), made_manifest([]))
    written = pq.read_schema(path)
    assert {field.name: str(field.type).replace("item:", "element:") for field in written} == GOLDEN


def test_rows_and_manifest_come_back(tmp_path: Path) -> None:
    rows = [made_row(0, chunk_tokens=(1, 2)), made_row(1, error="http 500", chunk_s=(), chunk_tokens=())]
    path = tmp_path / "rows.parquet"
    write_parquet(path, make_table(rows), made_manifest(rows))
    manifest, frame = read_parquet(path)
    assert manifest.schedule.num_requests == 2
    assert list(frame["request_id"]) == ["run-0-00000", "run-0-00001"]
    np.testing.assert_array_equal(frame["chunk_tokens"].iloc[0], [1, 2])
    assert frame["error"].isna().tolist() == [True, False]
    assert not list(tmp_path.glob("*.partial"))


def test_every_column_of_a_row_is_in_the_schema() -> None:
    assert set(made_row()) == set(SCHEMA.names)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(LabError, match="cannot be read as parquet"):
        read_parquet(path)
    pq.write_table(SCHEMA.empty_table(), path)
    with pytest.raises(LabError, match="carries no manifest"):
        read_parquet(path)


def write_journal(folder: Path, num_rows: int, *, planned: int) -> Path:
    rows = [made_row(i) for i in range(planned)]
    manifest = made_manifest(rows, entries=[])
    path = folder / f"stamp{JOURNAL_SUFFIX}"
    journal = Journal(path, manifest)
    for row in rows[:num_rows]:
        journal.append(row)
    return path  # never closed, as after a kill


def test_each_row_is_in_the_file_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / f"a{JOURNAL_SUFFIX}"
    journal = Journal(path, made_manifest([]))
    for number in range(3):
        journal.append(made_row(number))
        assert len(read_journal(path)[1]) == number + 1
    journal.append_repeat(made_repeat(1))
    assert [entry.repeat for entry in read_journal(path)[0].repeats] == [0, 1]
    journal.close()


def test_a_cut_off_line_is_dropped(tmp_path: Path) -> None:
    path = write_journal(tmp_path, 3, planned=5)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    assert len(read_journal(path)[1]) == 2


def test_recovery_writes_the_parquet_and_says_what_is_missing(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, 3, planned=5)
    path = recover(journal)
    assert path == tmp_path / "stamp.parquet"
    manifest, frame = read_parquet(path)
    assert len(frame) == 3
    assert manifest.validity is not None
    assert manifest.validity.level == "INVALID"
    assert "2 of 5 requests were never finished" in manifest.validity.invalid
    assert journal.exists()


def test_recovery_overwrites_nothing(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, 1, planned=1)
    recover(journal)
    with pytest.raises(LabError, match="already there"):
        recover(journal)


def test_only_journals_are_recovered(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"should end in \.journal\.jsonl"):
        recover(tmp_path / "x.parquet")
    path = tmp_path / f"x{JOURNAL_SUFFIX}"
    path.write_text(json.dumps({"row": {}}) + "\n")
    with pytest.raises(LabError, match="does not begin with a manifest"):
        recover(path)
