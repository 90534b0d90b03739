"""Records survive what happens to their neighbours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from adapters.base import LabError
from harness.results import line_file
from harness.results.line_file import LineFile, read_records


class Disk:
    """Stands in for `os`: each write takes as many bytes as it is told to, none when told 0."""

    def __init__(self, taken: Iterable[int]) -> None:
        self._taken = iter(taken)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        taken = next(self._taken, len(data))
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data[:taken])


def numbers(path: Path) -> list[int]:
    return [content["n"] for _, content in read_records(path)[0]]


def write(file: LineFile, *values: int) -> None:
    for value in values:
        file.append("row", b'{"n":%d}' % value)


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_file, "os", Disk([3, 5, 1]))
    file = LineFile(tmp_path / "x", is_new=True)
    write(file, 1, 2)
    file.close()
    assert read_records(tmp_path / "x") == ([("row", {"n": 1}), ("row", {"n": 2})], 0)


def test_a_record_that_a_full_disk_cut_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "os", Disk([99, 10, 0]))
    file = LineFile(tmp_path / "x", is_new=True)
    write(file, 1)
    with pytest.raises(LabError, match=r"cannot write .*x: No space left on device"):
        write(file, 2)
    write(file, 3, 4)
    file.close()
    assert numbers(tmp_path / "x") == [1, 3, 4]
    assert read_records(tmp_path / "x")[1] == 1


def test_a_file_that_was_cut_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "x"
    file = LineFile(path, is_new=True)
    write(file, 1, 2)
    file.close()
    path.write_bytes(path.read_bytes()[:-5])
    file = LineFile(path, is_new=False)
    write(file, 3)
    file.close()
    assert numbers(path) == [1, 3]


@pytest.mark.parametrize(
    "between", [b"", b"garbage", b"\x00" * 9, b'{"row":{"n":7},"crc32":"00000000"}', b"\r"]
)
def test_records_are_found_where_their_line_ends_are_lost(tmp_path: Path, between: bytes) -> None:
    path = tmp_path / "x"
    file = LineFile(path, is_new=True)
    write(file, 1, 2, 3)
    file.close()
    path.write_bytes(path.read_bytes().replace(b"\n", between))
    assert numbers(path) == [1, 2, 3]


def test_a_record_with_another_byte_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    file = LineFile(path, is_new=True)
    write(file, 10, 20, 30)
    file.close()
    path.write_bytes(path.read_bytes().replace(b'"n":20', b'"n":28'))
    assert (numbers(path), read_records(path)[1]) == ([10, 30], 1)


def test_records_without_a_checksum_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'{"row":{"n":1}}\n{"row":{"n":2\n[1]\n{"row":{"n":3}}\n')
    assert (numbers(path), read_records(path)[1]) == ([1, 3], 2)
