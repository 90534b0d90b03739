"""Stop strings and merging, without HTTP."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import SamplingParams, Sequence
from adapters.text.tokenizer import ByteTokenizer
from services.core.outputs import LiveRequest, News, StopMatcher
from services.engine.messages import SequenceUpdate
from services.errors import Refusal, draining
from tests.services.scripted_engine import TIMINGS, last


def live_request(*stops: str, num_prompts: int = 1, streamed: bool = True) -> LiveRequest:
    sequences = [Sequence(i, [1, 2], SamplingParams()) for i in range(num_prompts)]
    streams = [ByteTokenizer().stream() for _ in sequences]
    return LiveRequest("r", sequences, streams, stops, streamed=streamed)


def take(live: LiveRequest, index: int, text: str, *, ends: bool = False) -> None:
    token_ids = list(text.encode())
    update = last(index, token_ids) if ends else SequenceUpdate(index, token_ids)
    live.take(live.answers[index], update)


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


def test_updates_merge_until_the_writer_asks() -> None:
    async def scenario() -> None:
        live = live_request(num_prompts=2)
        take(live, 1, "ab")
        take(live, 0, "x")
        take(live, 1, "c", ends=True)
        first = await live.news()
        assert [(news.index, news.text, bytes(news.token_ids)) for news in first] == [
            (1, "abc", b"abc"),
            (0, "x", b"x"),
        ]
        assert first[0].ending is not None
        assert first[0].ending.num_output_tokens == 3
        take(live, 0, "y", ends=True)
        assert [news.text for news in await live.news()] == ["y"]
        assert live.is_over

    asyncio.run(scenario())


def test_what_was_handed_over_does_not_change_afterwards() -> None:
    async def scenario() -> None:
        live = live_request()
        take(live, 0, "a")
        news = await live.news()
        take(live, 0, "b")
        assert news == [News(0, "a", [97])]

    asyncio.run(scenario())


def test_tokens_after_a_stop_string_are_left_out() -> None:
    live = live_request("lo")
    take(live, 0, "hello wor")
    assert live.answers[0].stopped
    take(live, 0, "ld")
    live.take(live.answers[0], SequenceUpdate(0, [1], "length", TIMINGS))
    news = live.answers[0].collect()
    assert news is not None
    assert news.ending is not None
    assert (news.text, bytes(news.token_ids)) == ("hel", b"hello")
    assert (news.ending.reason, news.ending.num_output_tokens, news.ending.timings) == ("stop", 5, TIMINGS)


def test_text_held_back_comes_with_the_end() -> None:
    live = live_request("</s>")
    take(live, 0, "ab</")
    news = live.answers[0].collect()
    assert news is not None
    assert (news.text, bytes(news.token_ids)) == ("ab", b"ab</")
    take(live, 0, "s", ends=True)
    news = live.answers[0].collect()
    assert news is not None
    assert news.text == "</s"


@pytest.mark.parametrize("end", [lambda live: live.leave(), lambda live: live.fail(draining())])
def test_the_writer_wakes_when_there_is_nobody_or_nothing_more(end) -> None:  # type: ignore[no-untyped-def]
    async def scenario() -> None:
        live = live_request()
        waiting = asyncio.create_task(live.news())
        await asyncio.sleep(0)
        end(live)
        assert await waiting == []
        assert live.is_over

    asyncio.run(scenario())


def test_the_first_failure_counts() -> None:
    live = live_request()
    live.fail(Refusal(503, "first", code="a"))
    live.fail(Refusal(503, "second", code="b"))
    assert live.failure is not None
    assert live.failure.message == "first"


def test_a_failed_sequence_fails_its_request_with_the_reason() -> None:
    live = live_request(num_prompts=2)
    live.take(live.answers[1], SequenceUpdate(1, [], "error", TIMINGS, "out of memory"))
    assert live.failure is not None
    assert live.failure.status == 500
    assert "out of memory" in live.failure.message
