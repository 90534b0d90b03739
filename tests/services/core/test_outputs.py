"""Stop strings and merging, without HTTP."""

from __future__ import annotations

import asyncio
from typing import Any, SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import SamplingParams, Sequence
from adapters.text.detokenizer import SpelledStream
from adapters.text.tokenizer import ByteTokenizer
from services.core.outputs import ChoiceOutput, RequestState, StopMatcher
from services.core.special_text import mark_special
from services.engine.messages import SequenceUpdate
from services.errors import ApiError, draining
from tests.services.scripted_engine import TIMINGS, last


def new_request(*stops: str, num_prompts: int = 1, streamed: bool = True) -> RequestState:
    sequences = [Sequence(i, [1, 2], SamplingParams()) for i in range(num_prompts)]
    streams = [ByteTokenizer().stream() for _ in sequences]
    return RequestState("r", sequences, streams, stops, streamed=streamed)


def take(request: RequestState, index: int, text: str, *, ends: bool = False) -> None:
    token_ids = list(text.encode())
    update = last(index, token_ids) if ends else SequenceUpdate(index, token_ids)
    request.add_update(request.choices[index], update)


def first_end(text: str, stops: list[str]) -> int | None:
    """Where the first stop string to be complete begins, by looking at every prefix."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_where_the_whole_text_says(pieces: list[str], stops: list[str]) -> None:
    matcher, shown, stopped = StopMatcher(stops), "", False
    text = "".join(pieces)
    for char in text:
        new, stopped = matcher.push(char)
        shown += new
        assert text.startswith(shown), "what was shown is never taken back"
        if stopped:
            break
    else:
        shown += matcher.flush()
    begin = first_end(text, stops)
    assert stopped == (begin is not None)
    assert shown == (text if begin is None else text[:begin])


class CountedText(str):
    """Counts how often one of its characters is looked at."""

    num_looks = 0

    def __getitem__(self, index: SupportsIndex | slice[Any, Any, Any]) -> str:
        self.num_looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("text", ["a" * 5000, ("a" * 254 + "c") * 20, ("a" * 127 + "b") * 40])
def test_no_stop_string_makes_a_token_dear(text: str) -> None:
    stops = [CountedText("a" * (240 + i) + "b") for i in range(16)]
    matcher = StopMatcher(stops)
    for stop in stops:
        stop.num_looks = 0
    for begin in range(0, len(text), 3):
        assert not matcher.push(text[begin : begin + 3])[1]
    assert max(stop.num_looks for stop in stops) <= 4 * len(text)


@given(st.lists(st.text("ab", max_size=4), max_size=6), st.text("ab", min_size=1, max_size=3))
def test_a_stop_string_is_found_however_the_text_is_cut(pieces: list[str], stop: str) -> None:
    matcher, shown = StopMatcher([stop]), ""
    for piece in pieces:
        new, stopped = matcher.push(piece)
        shown += new
        if stopped:
            break
    else:
        shown += matcher.flush()
    assert shown == "".join(pieces).partition(stop)[0]


def special_request(stop: str, **options: bool) -> RequestState:
    """A byte is its own token; 300 is `<|im_end|>`, whose text is left out."""
    stops, marks = mark_special([stop], {300: "<|im_end|>", 301: "<|im_end|>x"})
    stream = SpelledStream(ByteTokenizer().stream(), marks)
    seq = Sequence(0, [1], SamplingParams())
    return RequestState("r", [seq], [stream], stops, streamed=True, has_marks=bool(marks), **options)


@pytest.mark.parametrize(
    ("stop", "token_ids", "text", "num_tokens"),
    [
        ("<|im_end|>", [97, 300, 98], "a", 2),
        ("b<|im_end|>", [97, 300, 98, 99, 98, 300, 97], "abc", 6),
        ("<|im_end|>c", [97, 300, 98, 300, 99], "ab", 5),
        ("<|im_end|>", [*b"a<|im_end|>b"], "a", 11),
    ],
)
def test_stop_strings_match_special_tokens(
    stop: str, token_ids: list[int], text: str, num_tokens: int
) -> None:
    request = special_request(stop)
    (choice,) = request.choices
    for token_id in token_ids:
        choice.add_update(SequenceUpdate(0, [token_id]))
    assert choice.is_stopped
    output = choice.take_output()
    assert output is not None
    assert (output.text, len(output.token_ids)) == (text, num_tokens)


def test_no_mark_is_ever_shown() -> None:
    request = special_request("<|im_end|>zz")
    (choice,) = request.choices
    choice.add_update(SequenceUpdate(0, [97, 300, 98, 300]))
    choice.add_update(last(0, [300]))
    output = choice.take_output()
    assert output is not None
    assert output.text == "ab"


def test_updates_merge_until_the_writer_asks() -> None:
    async def scenario() -> None:
        request = new_request(num_prompts=2)
        take(request, 1, "ab")
        take(request, 0, "x")
        take(request, 1, "c", ends=True)
        first = await request.next_output()
        assert [(output.index, output.text, bytes(output.token_ids)) for output in first] == [
            (1, "abc", b"abc"),
            (0, "x", b"x"),
        ]
        assert first[0].finish_reason is not None
        assert first[0].num_output_tokens == 3
        take(request, 0, "y", ends=True)
        assert [output.text for output in await request.next_output()] == ["y"]
        assert request.is_over

    asyncio.run(scenario())


def test_what_was_handed_over_does_not_change_afterwards() -> None:
    async def scenario() -> None:
        request = new_request()
        take(request, 0, "a")
        output = await request.next_output()
        take(request, 0, "b")
        assert output == [ChoiceOutput(0, "a", [97])]

    asyncio.run(scenario())


def test_tokens_after_a_stop_string_are_left_out() -> None:
    request = new_request("lo")
    take(request, 0, "hello wor")
    assert request.choices[0].is_stopped
    take(request, 0, "ld")
    request.add_update(request.choices[0], SequenceUpdate(0, [1], "length", TIMINGS))
    output = request.choices[0].take_output()
    assert output is not None
    assert output.finish_reason is not None
    assert (output.text, bytes(output.token_ids)) == ("hel", b"hello")
    assert (output.finish_reason, output.num_output_tokens, output.timings) == ("stop", 5, TIMINGS)


def test_text_held_back_comes_with_the_end() -> None:
    request = new_request("</s>")
    take(request, 0, "ab</")
    output = request.choices[0].take_output()
    assert output is not None
    assert (output.text, bytes(output.token_ids)) == ("ab", b"ab</")
    take(request, 0, "s", ends=True)
    output = request.choices[0].take_output()
    assert output is not None
    assert output.text == "</s"


@pytest.mark.parametrize("end", [RequestState.disconnect, lambda request: request.fail(draining())])
def test_the_writer_wakes_when_there_is_nobody_or_nothing_more(end) -> None:  # type: ignore[no-untyped-def]
    async def scenario() -> None:
        request = new_request()
        waiting = asyncio.create_task(request.next_output())
        await asyncio.sleep(0)
        end(request)
        assert await waiting == []
        assert request.is_over

    asyncio.run(scenario())


def test_the_first_failure_counts() -> None:
    request = new_request()
    request.fail(ApiError(503, "first", code="a"))
    request.fail(ApiError(503, "second", code="b"))
    assert request.error is not None
    assert request.error.message == "first"


def test_a_failed_sequence_fails_its_request_with_the_reason() -> None:
    request = new_request(num_prompts=2)
    request.add_update(request.choices[1], SequenceUpdate(1, [], "error", TIMINGS, "out of memory"))
    assert request.error is not None
    assert request.error.status == 500
    assert "out of memory" in request.error.message
