"""Lines of JSON that outlast a kill, a full disk and damaged bytes: what journals and ledgers are made of.

Each record carries a CRC-32, so that a damaged one is passed over and never believed. A record that a full
disk cut off takes none of its neighbours with it: the next one begins on a line of its own.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from adapters.base import LabError

_START = re.compile(rb'\{"\w+":')
_END = re.compile(rb',"crc32":"([0-9a-f]{8})"\}')


class LineFile:
    """Appends records; each is handed to the operating system before `append` returns.

    Raises:
        FileExistsError: `is_new`, and a file is there.
        LabError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, is_new: bool) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | is_new * os.O_EXCL, 0o666)
        except FileExistsError:
            raise
        except OSError as error:
            raise _failed(path, error) from error
        size = os.fstat(self._descriptor).st_size
        self._is_torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def append(self, kind: str, content: bytes) -> None:
        """Write one record of JSON.

        Raises:
            LabError: the disk took no more; part of the record may be in the file, which harms no other.
        """
        named = b'"%b":%b' % (kind.encode(), content)
        line = b'%b{%b,"crc32":"%08x"}\n' % (b"\n" * self._is_torn, named, zlib.crc32(named))
        self._is_torn = True
        try:
            while line:  # a disk that fills up takes the beginning alone, without an error
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise _failed(self.path, error) from error
        self._is_torn = False

    def close(self) -> None:
        os.close(self._descriptor)


def read_records(path: Path) -> tuple[list[tuple[str, Any]], int]:
    """Kind and content of every record that is whole, and how many lines hold something else.

    Raises:
        LabError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror or error}") from error
    found: list[tuple[str, Any]] = []
    num_damaged = 0
    for line in filter(None, lines):
        whole = list(_whole_records(line))
        found += (_decode(record) for record in whole)
        if not whole and (plain := _without_crc(line)) is not None:
            found.append(plain)
        elif sum(map(len, whole)) < len(line):
            num_damaged += 1
    return found, num_damaged


def _whole_records(line: bytes) -> Iterator[bytes]:
    """The records of a line that are as they were written. Damage may have joined several lines."""
    begin = 0
    for end in _END.finditer(line):
        for start in _START.finditer(line, begin, end.start()):
            if zlib.crc32(line[start.start() + 1 : end.start()]) == int(end[1], 16):
                yield line[start.start() : end.end()]
                begin = end.end()
                break


def _decode(record: bytes) -> tuple[str, Any]:
    kind, content = next(iter(from_json(record).items()))
    return kind, content


def _without_crc(line: bytes) -> tuple[str, Any] | None:
    """A record as earlier versions wrote it."""
    try:
        record = from_json(line)
    except ValueError:
        return None
    return next(iter(record.items())) if isinstance(record, dict) and len(record) == 1 else None


def _failed(path: Path, error: OSError) -> LabError:
    return LabError(f"cannot write {path}: {error.strerror or error}")
