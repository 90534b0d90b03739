"""Random damage to every kind of file that a command reads: one sentence at worst, and no whole row lost.

DAMAGES is how many are tried, over all kinds together (`make damages` tries 2,000).
"""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from adapters.base import LabError
from harness.comparing.compare_runs import Ledger
from harness.plan.text_file import decode
from harness.plan.trace_formats import parse_trace
from harness.replay.arm_file import Arm, Measurement
from harness.results.manifest import RunManifest, Validity
from harness.results.record import (
    JOURNAL_SUFFIX,
    MANIFEST_KEY,
    Journal,
    make_table,
    read_parquet,
    write_parquet,
)
from harness.results.steps import STEPS_SUFFIX, step_rows, write_steps
from services.contract.status import StepLine
from tests.harness.comparing.test_comparison import run_rows
from tests.harness.made_rows import made_manifest, made_repeat, made_row
from tools.cli import main

NUM_DAMAGES = int(os.environ.get("DAMAGES", "60"))
KINDS = ("journal", "parquet", "manifest", "steps", "ledger", "trace")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut off, flipped, zeroed, doubled or with garbage in it, once or twice."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2))):
        at = draw.randrange(len(data) + 1)
        size = draw.choice((1, 2, 7, 64, 512, 4096))
        match draw.randrange(6):
            case 0:
                del data[at:]
            case 1:
                for _ in range(draw.choice((1, 1, 3, 9))):
                    if data:
                        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 2:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at:at] = draw.randbytes(size)
            case 5:
                del data[at : at + size]
    return bytes(data)


def lab(*words: str | Path) -> int:
    """Whatever is raised here ends the test: a command may fail with its sentence alone."""
    return main([str(word) for word in words])


def by_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: str(row["request_id"]))


def try_journal(folder: Path, draw: random.Random) -> None:
    rows = [made_row(i, repeat=r, token_ids=[i]) for r in (0, 1) for i in range(20)]
    path = folder / f"run{JOURNAL_SUFFIX}"
    journal = Journal(path, made_manifest(rows, repeats=2, entries=[]))
    for number, row in enumerate(rows):
        journal.append(row)
        if number % 20 == 19:
            journal.append_repeat(made_repeat(number // 20))
    journal.close()
    lines = [line for line in path.read_bytes().split(b"\n") if line.startswith(b'{"row"')]
    path.write_bytes(damaged(path.read_bytes(), draw))
    whole = [row for row, line in zip(rows, lines, strict=True) if line in path.read_bytes()]
    assert lab("report", path) in (0, 1, 2)
    assert lab("report", path, "--recover") in (0, 1, 2)
    written = folder / "run.parquet"
    found = pq.read_table(written).to_pylist() if written.exists() else []
    # Neither is a whole row lost, nor a damaged one believed.
    assert by_id(found) == by_id(make_table(whole).to_pylist())


def groups_that_are_whole(content: bytes, damaged: bytes, path: Path) -> list[int]:
    """By their bytes; none where the index at the end is not whole."""
    index_bytes = int.from_bytes(content[-8:-4], "little") + 8
    if content[-index_bytes:] != damaged[-index_bytes:] or damaged[:4] != b"PAR1":
        return []
    metadata = pq.read_metadata(path)
    whole = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        begin = min(c.dictionary_page_offset or c.data_page_offset for c in chunks)
        end = begin + sum(c.total_compressed_size for c in chunks)
        if content[begin:end] == damaged[begin:end]:
            whole.append(number)
    return whole


def try_parquet(folder: Path, draw: random.Random) -> None:
    rows = [made_row(i, token_ids=[i], sent_s=i, chunk_s=(i + 0.5, i + 1.0)) for i in range(300)]
    path = folder / "run.parquet"
    write_parquet(path, make_table(rows), made_manifest(rows, validity=Validity()))
    content = path.read_bytes()
    other = folder / "other.parquet"
    other.write_bytes(content)
    damage = damaged(content, draw)
    path.write_bytes(damage)
    status = lab("report", path)
    assert status in (0, 1, 2)
    assert lab("gate", path, "--against", other) in (2, 4)  # 4: two files were not measured in turns
    recovered = folder / "run.recovered.parquet"
    found: list[str] = []
    if status == 2:
        with suppress(LabError):
            lab("report", path, "--recover")
    if status != 2 or recovered.exists():
        found = list(read_parquet(path if status != 2 else recovered)[1]["request_id"])
    for number in groups_that_are_whole(content, damage, other):
        ids = {row["request_id"] for row in rows[128 * number : 128 * (number + 1)]}
        assert ids <= set(found), "a whole row is lost"


def try_manifest(folder: Path, draw: random.Random) -> None:
    """As files of earlier versions hold it: nothing tells that a byte is another."""
    rows = [row for block in range(3) for row in run_rows("continuous", block, 1.0)]
    manifest = made_manifest(rows, repeats=3, validity=Validity())
    path, other = folder / "run.parquet", folder / "other.parquet"
    write_parquet(other, make_table(rows), manifest)
    table = make_table(rows).replace_schema_metadata({MANIFEST_KEY: damaged(manifest.to_json(), draw)})
    pq.write_table(table, path)
    assert lab("report", path) in (0, 1, 2)
    assert lab("report", path, other, "--markdown") in (0, 1, 2)
    assert lab("compare", "--files", path, other, "--allow-invalid") in (0, 1, 2)
    assert lab("gate", path, "--against", other, "--allow-invalid") in (0, 2, 4)
    assert lab("merge", path, "--out", folder / "merged.parquet") in (0, 1, 2)
    assert len(pd.read_parquet(path)) == len(rows)


def try_steps(folder: Path, draw: random.Random) -> None:
    rows = [made_row(i, sent_s=i, chunk_s=(i + 0.5, i + 1.0)) for i in range(60)]
    for row in rows:
        row |= {"received_s": row["sent_s"], "queue_s": 0.0, "batch_wait_s": 0.0}
        row |= {"prefill_s": 0.5, "decode_s": 0.5}
    manifest = made_manifest(rows, validity=Validity())
    path, log = folder / "run.parquet", folder / f"run{STEPS_SUFFIX}"
    write_parquet(path, make_table(rows), manifest)
    line = StepLine(
        step=0, start_s=0.0, duration_s=60.0, num_rows=1, num_prompt_tokens=1, num_decode_tokens=0,
        num_dead_rows=0, queue_depth=0,
    )  # fmt: skip
    write_steps(log, step_rows([line] * 200, "run", 0), manifest)
    log.write_bytes(damaged(log.read_bytes(), draw))
    assert lab("report", path, log) == 0


def try_ledger(folder: Path, draw: random.Random) -> None:
    rows = run_rows("a", 0, 1.0)
    manifest = made_manifest(rows, arm="a", validity=Validity())
    path = folder / "run.parquet"
    write_parquet(path, make_table(rows), manifest)
    ledger = Ledger(folder, "p" * 64, resume=True)
    for block in range(20):
        ledger.add(block, Measurement(path, pd.DataFrame(), manifest, Validity()))
    lines = ledger.path.read_bytes().splitlines()
    ledger.path.write_bytes(damaged(ledger.path.read_bytes(), draw))
    whole = {block for block, line in enumerate(lines) if line in ledger.path.read_bytes()}
    again = Ledger(folder, "p" * 64, resume=True)
    assert {block for block, _ in again._done} == whole
    # A line that is added to a cut file is read, and takes no other with it.
    again.add(99, Measurement(path, pd.DataFrame(), manifest, Validity()))
    last = Ledger(folder, "p" * 64, resume=True)
    assert {block for block, _ in last._done} == whole | {99}
    assert last.read(99, Arm("a", "a")) is not None


def try_trace(folder: Path, draw: random.Random) -> None:
    if draw.random() < 0.5:
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        lines += [f"2023-11-16 18:17:{i // 10:02}.{i % 10}000000,{100 + i},{10 + i}" for i in range(200)]
    else:
        lines = [f'{{"timestamp": {i}, "input_length": {100 + i}, "output_length": 9}}' for i in range(200)]
    path = folder / "trace"
    content = "".join(line + "\n" for line in lines).encode()
    of_line = dict(zip(lines[-200:], parse_trace(decode(content, path), path), strict=True))
    damage = damaged(content, draw)
    path.write_bytes(damage)
    words = ["--trace", path, "--requests", "100000", "--url", "http://127.0.0.1:9", "--floor", "0"]
    assert lab("bench", *words) == 2  # nobody answers there, or the trace is refused
    with suppress(LabError):
        rows = parse_trace(decode(damage, path), path)
        for line in set(re.split("\r?\n", damage.decode(errors="replace"))) & of_line.keys():
            assert of_line[line] in rows, "a whole row is lost"


TRIES: dict[str, Callable[[Path, random.Random], None]] = {
    "journal": try_journal, "parquet": try_parquet, "manifest": try_manifest, "steps": try_steps,
    "ledger": try_ledger, "trace": try_trace,
}  # fmt: skip


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_damage(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(NUM_DAMAGES // len(KINDS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TRIES[kind](folder, random.Random(f"{kind}/{number}"))
        told = capsys.readouterr()
        assert "Traceback" not in told.err + told.out
        assert all(len(line) < 1000 for line in told.err.splitlines())


def test_the_manifest_of_a_whole_file_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    manifest = made_manifest([made_row()])
    write_parquet(path, make_table([made_row()]), manifest)
    assert isinstance(read_parquet(path)[0], RunManifest)
