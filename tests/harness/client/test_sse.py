"""Events come out whole, however the bytes were cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.client.sse import EventSplitter

STREAM = b'data: {"a": 1}\n\ndata: zwei\r\n\r\n: comment\nevent: x\ndata:three\r\rdata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b"zwei", b"three", b"[DONE]"]


def split(pieces: list[bytes]) -> list[bytes]:
    splitter = EventSplitter()
    return [event for piece in pieces for event in splitter.feed(piece)]


def test_whole_stream() -> None:
    assert split([STREAM]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut_gives_the_same_events(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert split([STREAM[a:b] for a, b in pairwise(edges)]) == EVENTS


def test_byte_by_byte() -> None:
    assert split([bytes([byte]) for byte in STREAM]) == EVENTS


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001c"])
def test_only_cr_and_lf_end_a_line(character: str) -> None:
    payload = f'{{"text":"a{character}b"}}'.encode()
    assert split([b"data: " + payload + b"\n\n"]) == [payload]


def test_crlf_cut_between_its_bytes_is_one_line_end() -> None:
    assert split([b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n"]) == [b"a\nb"]


def test_an_event_without_its_blank_line_is_not_given() -> None:
    assert split([b"data: whole\n\ndata: half\n"]) == [b"whole"]


def test_byte_order_mark_is_dropped() -> None:
    assert split([b"\xef", b"\xbb\xbfdata: a\n\n"]) == [b"a"]


def test_an_event_without_data_keeps_the_connection_alive_and_says_nothing() -> None:
    assert split([b"data:\n\n: ping\n\nevent: ping\ndata\n\ndata: a\n\n"]) == [b"a"]


def test_lines_that_are_no_fields_are_kept() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b'data: a\n\nerror: {"a"\n: ping\nid: 1\n\nretry: 2\n{"error": 1}') == [b"a"]
    assert splitter.stray_text() == 'error: {"a"\n{"error": 1}'
    assert splitter.feed(b"\ndata: b\n\ndata: half") == [b"b"]
    assert splitter.stray_text() == 'error: {"a"\n{"error": 1}\n'


def test_the_words_of_an_error_event_are_its_object() -> None:
    assert split([b"event: error\ndata: no\ndata: room\n\ndata: a\n\n"]) == [b'{"error": "no\\nroom"}', b"a"]


def test_a_line_without_end_is_refused() -> None:
    splitter = EventSplitter()
    for _ in range(16):
        splitter.feed(b"x" * (1 << 20))
    with pytest.raises(ValueError, match="without an end"):
        splitter.feed(b"x")
